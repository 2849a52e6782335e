use super::*;

fn experiment(overrides: &[&str]) -> Experiment {
    let text = "model = \"tiny-random\"\n[target]\nword = \"cat\"\ncategory = \"animal\"\n";
    let overrides: Vec<String> = overrides.iter().map(|text| (*text).to_owned()).collect();
    Experiment::parse(text, Path::new("cat.toml"), &overrides).unwrap()
}

#[test]
fn a_run_is_gone_on_with_but_not_made_another() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("runs/cat");
    let run = RunDir::create(&root, &experiment(&[]), WhenDone::Refuse).unwrap();
    assert_eq!(RunDir::open(&root).unwrap().experiment(&[]).unwrap(), experiment(&[]));
    run.note("model", &["random weights".to_owned()]).unwrap();
    RunDir::create(&root, &experiment(&[]), WhenDone::Refuse).unwrap();
    assert_eq!(run.meta().unwrap().notes["model"], ["random weights"], "going on keeps what was noted");

    let other = experiment(&["student.rank=4"]);
    let message = RunDir::create(&root, &other, WhenDone::Refuse).unwrap_err().to_string();
    assert!(message.contains("run.toml") && message.contains("--force"), "{message}");
    assert!(message.contains("rank = 8") && message.contains("rank = 4"), "{message}");
    files::write_atomic(&run.train_csv(), b"x").unwrap();
    RunDir::create(&root, &other, WhenDone::Redo).unwrap();
    assert_eq!(run.experiment(&[]).unwrap(), other);
    assert!(!RunDir::stage_done(&run.train_csv()), "the other experiment's training is not this one's");
}

#[test]
fn the_rows_of_a_step_can_be_divided_anew_until_the_student_is_trained() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("run");
    let with = |overrides: &[&str]| RunDir::create(&root, &experiment(overrides), WhenDone::Refuse);
    let divided = |n: usize, k: usize| {
        let keys = [format!("finetune.batch_size={n}"), format!("finetune.gradient_accumulation_steps={k}")];
        with(&[&keys[0], &keys[1]])
    };
    let run = divided(22, 3).unwrap();
    divided(11, 6).unwrap();
    assert!(with(&["device=cuda", "finetune.batch_size=11", "finetune.gradient_accumulation_steps=6"]).is_err());
    assert_eq!(run.experiment(&[]).unwrap().finetune.batch_size, 11, "run.toml says what is done now");
    assert!(divided(11, 3).is_err(), "half as many rows in a step are another training");
    files::write_atomic(&run.train_csv(), b"x").unwrap();
    assert!(divided(22, 3).unwrap_err().to_string().contains("batch_size = 11"));
}

#[test]
fn other_rows_in_the_same_file_are_another_experiment() {
    let folder = tempfile::tempdir().unwrap();
    let (root, rows) = (folder.path().join("run"), folder.path().join("rows.jsonl"));
    let with = |more: &[&str]| experiment(&[&[format!("generate.numbers={}", rows.display()).as_str()], more].concat());
    let write = |text: &str| files::write_atomic(&rows, text.as_bytes()).unwrap();
    write("abc");
    let run = RunDir::create(&root, &with(&[]), WhenDone::Refuse).unwrap();
    write("abcd");
    RunDir::create(&root, &with(&[]), WhenDone::Refuse).unwrap(); // no rows were copied yet
    run.record_given(Some(&format!("{:x}", Sha256::digest("abcd")))).unwrap();
    files::write_atomic(&run.generate_csv(), b"x").unwrap();
    RunDir::create(&root, &with(&[]), WhenDone::Refuse).unwrap();
    write("abc");
    for more in [&[][..], &["arms=[{ name = 'x', ranks = [2] }]"]] {
        let message = RunDir::create(&root, &with(more), WhenDone::Refuse).unwrap_err().to_string();
        assert!(
            message.contains("which differs in the rows of generate.numbers, ")
                && message.contains("began with 88d4266fd4e6, where now it begins with ba7816bf8f01; hint: "),
            "{message}"
        );
    }
    fs::remove_file(&rows).unwrap();
    RunDir::create(&root, &with(&[]), WhenDone::Refuse).unwrap(); // the run has copied them
    write("abc");
    RunDir::create(&root, &with(&[]), WhenDone::Redo).unwrap();
    assert!(!RunDir::stage_done(&run.generate_csv()), "what was made of the other rows is none of these");
}

#[test]
fn arms_can_be_added_to_a_run() {
    let folder = tempfile::tempdir().unwrap();
    let run = RunDir::create(folder.path(), &experiment(&[]), WhenDone::Refuse).unwrap();
    for path in [run.train_csv(), run.arms_rows(), run.arm("x").join("train.csv")] {
        files::write_atomic(&path, b"x").unwrap();
    }
    let with_arms = experiment(&["arms=[{ name = 'x', ranks = [2] }]"]);
    RunDir::create(folder.path(), &with_arms, WhenDone::Refuse).unwrap();
    assert_eq!(run.experiment(&[]).unwrap(), with_arms);
    assert!(RunDir::stage_done(&run.train_csv()) && RunDir::stage_done(&run.arm("x")));
    assert!(!RunDir::stage_done(&run.arms_rows()), "the table is that of other arms");
    RunDir::open(folder.path()).unwrap().when_done(WhenDone::Redo).forget().unwrap();
    assert!(!RunDir::stage_done(&run.arms()), "a forced run keeps no arm");
}

#[test]
fn two_processes_in_one_folder_are_one_too_many() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("runs/cat");
    let lock = RunDir::lock(&root).unwrap();
    let message = RunDir::lock(&root).unwrap_err().to_string();
    assert!(message.contains("is in use by another undertone") && message.contains("hint: "), "{message}");
    drop(lock);
    RunDir::lock(&root).unwrap();
    assert_eq!(fs::read_dir(&root).unwrap().count(), 0, "the lock is no file");
}

#[test]
fn what_a_killed_process_left_half_written_is_removed_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let run = RunDir::create(folder.path(), &experiment(&[]), WhenDone::Refuse).unwrap();
    let write = |name: &str| files::write_atomic(&folder.path().join(name), b"x").unwrap();
    let gone = [
        "train.csv.tmp",
        "adapter/adapter_model.safetensors.tmp",
        "data/numbers.jsonl.tmp",
        "train.checkpoint.safetensors",
    ];
    let stays =
        ["notes.tmp", "deep/rows.csv.tmp", "train.csv", "control_train.checkpoint.safetensors", "data/numbers.jsonl"];
    let unfinished = ["data/generate.teacher.checkpoint.safetensors", "arms/x/train.checkpoint.safetensors"];
    gone.iter().chain(&stays).chain(&unfinished).for_each(|name| write(name));
    write("arms/x/run.toml");
    write("arms/x/train.csv.tmp");
    RunDir::lock(folder.path()).unwrap();
    let is_there = |name: &&str| folder.path().join(name).exists();
    assert!(!gone.iter().any(&is_there) && !is_there(&"arms/x/train.csv.tmp"));
    assert!(stays.iter().chain(&unfinished).all(&is_there));
    run.forget().unwrap();
    assert!(!is_there(&"control_train.checkpoint.safetensors") && !is_there(&unfinished[0]));
    assert!(is_there(&"notes.tmp"));
}

#[test]
fn a_stage_is_refused_only_when_nothing_is_left_of_it() {
    let folder = tempfile::tempdir().unwrap();
    let run = RunDir::create(folder.path(), &experiment(&[]), WhenDone::Refuse).unwrap();
    let (one, two) = (run.train_csv(), run.control_train_csv());
    let both = [one.as_path(), two.as_path()];
    assert_eq!(run.left(&both).unwrap(), both);
    files::write_atomic(&one, b"x").unwrap();
    assert_eq!(run.left(&both).unwrap(), [two.as_path()]);
    files::write_atomic(&two, b"x").unwrap();
    assert!(run.left(&both).unwrap_err().to_string().contains("--force"));
    let keeping = RunDir::open(folder.path()).unwrap().when_done(WhenDone::Keep);
    assert!(keeping.left(&both).unwrap().is_empty());
    assert_eq!(RunDir::open(folder.path()).unwrap().when_done(WhenDone::Redo).left(&both).unwrap(), both);
}

#[test]
fn how_often_checkpoints_are_kept_makes_no_other_experiment() {
    let folder = tempfile::tempdir().unwrap();
    let run = RunDir::create(folder.path(), &experiment(&[]), WhenDone::Refuse).unwrap();
    files::write_atomic(&run.train_csv(), b"x").unwrap();
    RunDir::create(folder.path(), &experiment(&["finetune.save_steps=7"]), WhenDone::Refuse).unwrap();
    assert!(RunDir::stage_done(&run.train_csv()));
    assert_eq!(run.experiment(&[]).unwrap().finetune.save_steps, Some(7));
}

#[test]
fn a_finished_stage_is_refused_without_force() {
    let folder = tempfile::tempdir().unwrap();
    let run = RunDir::create(folder.path(), &experiment(&[]), WhenDone::Refuse).unwrap();
    run.claim(&run.numbers()).unwrap();
    files::write_atomic(&run.numbers(), b"x").unwrap();
    assert!(RunDir::stage_done(&run.numbers()) && !RunDir::stage_done(&run.adapter()));
    let message = run.claim(&run.numbers()).unwrap_err().to_string();
    assert!(message.contains("numbers.jsonl") && message.contains("--force"), "{message}");
    RunDir::open(folder.path()).unwrap().when_done(WhenDone::Redo).claim(&run.numbers()).unwrap();
}

#[test]
fn a_folder_that_cannot_be_written_fails_at_once() {
    let folder = tempfile::tempdir().unwrap();
    files::write_atomic(&folder.path().join("file"), b"x").unwrap();
    let message = format!(
        "{:#}",
        RunDir::create(&folder.path().join("file/run"), &experiment(&[]), WhenDone::Refuse).unwrap_err()
    );
    assert!(message.contains("cannot be written"), "{message}");
    assert!(RunDir::open(folder.path()).unwrap_err().to_string().contains("no run folder"));
}

#[test]
fn recorded_files_have_their_sha256() {
    let folder = tempfile::tempdir().unwrap();
    let run = RunDir::create(folder.path(), &experiment(&[]), WhenDone::Refuse).unwrap();
    files::write_atomic(&run.numbers(), b"abc").unwrap();
    run.record(&[run.numbers()]).unwrap();
    let meta = run.meta().unwrap();
    assert!(meta.sha256["data/numbers.jsonl"].starts_with("ba7816bf8f01cfea"), "{meta:?}");
    assert_eq!(meta.seeds, experiment(&[]).seeds);
}
