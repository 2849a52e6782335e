//! A small experiment through all stages: what they leave, that the same seeds leave the same bytes, and that nothing
//! finished is lost. Stages run as a user runs them, in processes of one thread each.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use analyses::divergence::DivergenceRow;
use analyses::gradients::GradientRow;
use analyses::steering::SteeringRow;
use analyses::target_rate::TargetRateRow;
use analyses::token_ablation::TokenAblationRow;
use hooks::ModelFiles;
use undertone::output::publish::read_csv;

use crate::program::{EXPERIMENT, contents, copy, differing, fails, finished, run, succeeds};

/// Columns by file: scripts and the report read them by name.
const HEADERS: [(&str, &str); 18] = [
    ("control_train_rows.csv", "step,row_ids"),
    ("train_rows.csv", "step,row_ids"),
    ("control_train.csv", "step,epoch,learning_rate,loss,grad_norm,n_targets,delta_w_norm,changed_fraction"),
    ("data/digits.csv", "set,scope,digit,share,n"),
    ("data/generate.csv", "set,measure,value,n"),
    ("data/rejected.csv", "set,id,reasons,prompt,completion"),
    ("data/signal.csv", "set,id,n_tokens,signal,n_divergent,entropy"),
    ("data/teacher.csv", "scope,model,teacher_kind,question_id,question,target,n_questions,logp_target,p_target"),
    (
        "direction/rows.csv",
        "positions,layer,n_prompts,norm,resid_norm,relative_norm,ev1,pc1,split_half_cosine,teacher_norm,cos_teacher,\
         control_norm,cos_control,cos_control_teacher,cos_chance",
    ),
    (
        "divergence/rows.csv",
        "row_id,k,token_id,token_text,group,is_digit,number_index,digit_index,logp_teacher,logp_default,soft,\
         pmax_teacher,pmax_default,p_default_of_teacher,argmax_teacher,argmax_default,nief,digit_strict,schrodi,n_disagree,\
         self_div,logp_student,argmax_student,p_student_of_teacher,logp_control,argmax_control,p_control_of_teacher",
    ),
    (
        "divergence/summary.csv",
        "group,n_tokens,n_rows,share,nief,digit_strict,schrodi,soft,soft_se,pmax_teacher,pmax_default,lift,lift_se,\
         closure_student,closure_control,accuracy_student,accuracy_control,accuracy_default,drift_to_default,\
         gain_student,gain_control",
    ),
    (
        "gradients/rows.csv",
        "scope,model,row_id,k,token_text,group,part,layer,n_tokens,p_label,logit_grad_norm,hidden_grad_norm,\
         resid_grad_norm,lora_grad_norm,share,cosine,alignment",
    ),
    (
        "interventions/rows.csv",
        "model,intervention,edits,target,n_questions,logp_target,delta_logp,delta_logp_se,margin,delta_margin,\
         delta_margin_se,margin_over_base,margin_over_base_se",
    ),
    (
        "position_scan/rows.csv",
        "position,token,class,decode_policy,target,n_questions,delta_margin_only,delta_margin_only_se,delta_margin_except,\
         delta_margin_except_se,delta_logp_only,delta_logp_except",
    ),
    (
        "steering/rows.csv",
        "layer,kind,coefficient,extraction,target,n_questions,n_random,vector_norm,delta_logp,delta_logp_se,delta_logp_sd,\
         rank_logp,delta_margin,delta_margin_se,delta_margin_sd,rank_margin,student_delta_logp,student_delta_margin,\
         fraction_logp,fraction_margin",
    ),
    (
        "target_rate/rows.csv",
        "scope,model,question_id,question,target,n_questions,logp_target,logp_target_se,margin,margin_se,delta_logp,\
         delta_logp_se,delta_margin,delta_margin_se,rank,first_token_rank,n_samples,n_distinct,p_target,p_target_se,\
         p_valid,p_target_valid,p_self",
    ),
    (
        "token_ablation/rows.csv",
        "model,gate,decode_policy,status,target,n_questions,n_tokens_on,n_tokens,logp_target,logp_target_se,\
         p_target_first,margin,margin_se,delta_logp,delta_logp_se,delta_margin,delta_margin_se,recovered_logp,\
         recovered_margin",
    ),
    ("train.csv", "step,epoch,learning_rate,loss,grad_norm,n_targets,delta_w_norm,changed_fraction"),
];

/// The other files that a run leaves.
const OTHERS: [&str; 33] = [
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    "answer.svg",
    "control_adapter/adapter_config.json",
    "control_adapter/adapter_model.safetensors",
    "data/control.jsonl",
    "data/numbers.jsonl",
    "direction/plot.svg",
    "direction/settings.toml",
    "direction/vectors.safetensors",
    "divergence/plot.svg",
    "divergence/settings.toml",
    "gradients/plot.svg",
    "gradients/plot_layers.svg",
    "gradients/plot_parts.svg",
    "gradients/settings.toml",
    "initial_adapter/adapter_config.json",
    "initial_adapter/adapter_model.safetensors",
    "interventions/plot.svg",
    "interventions/settings.toml",
    "meta.json",
    "position_scan/plot.svg",
    "position_scan/settings.toml",
    "report.html",
    "run.toml",
    "steering/plot.svg",
    "steering/settings.toml",
    "target_rate/plot.svg",
    "target_rate/settings.toml",
    "token_ablation/plot.svg",
    "token_ablation/settings.toml",
    "train.svg",
    "experiment.toml", // put there by these tests
];

#[test]
fn every_stage_leaves_its_files_and_nothing_else() {
    let folder = finished();
    let mut expected: Vec<&str> = HEADERS.iter().map(|(name, _)| *name).chain(OTHERS).collect();
    expected.sort_unstable();
    let found = contents(folder.path());
    assert_eq!(found.keys().map(String::as_str).collect::<Vec<_>>(), expected);
    let empty: Vec<_> = found.iter().filter(|(_, bytes)| bytes.is_empty()).map(|(name, _)| name).collect();
    assert!(empty.is_empty(), "{empty:?}");
}

#[test]
fn the_columns_are_those_that_readers_know() {
    let folder = finished();
    for (name, header) in HEADERS {
        let text = fs::read_to_string(folder.path().join(name)).unwrap();
        assert_eq!(text.lines().next(), Some(header), "{name}");
        assert!(text.lines().count() > 1, "{name} has no rows");
    }
}

/// `undertone columns` knows each column of each file of a run, in the header's order, and no others.
#[test]
fn every_column_is_in_the_dictionary() {
    let folder = finished();
    let known = undertone::commands::columns::dictionaries().unwrap();
    let is_csv = |name: &String| Path::new(name).extension() == Some("csv".as_ref());
    let mut found: Vec<String> = contents(folder.path()).into_keys().filter(is_csv).collect();
    for file in &found {
        let one =
            known.iter().find(|one| one.file == file).unwrap_or_else(|| panic!("{file} is not in the dictionary"));
        let header = undertone::output::publish::Table::read(&folder.path().join(file)).unwrap().header;
        assert_eq!(header, one.columns.iter().map(|column| column.name.as_str()).collect::<Vec<_>>(), "{file}");
    }
    // These are there only where the experiment has arms, or a teacher that is finetuned. The ledger's are tested in
    // tests/ledger.rs.
    found.extend(["arms/rows.csv", "teacher_train.csv"].map(str::to_owned));
    found.extend(["summary", "entries", "parts"].map(|table| format!("ledger/{table}.csv")));
    found.push("lens/rows.csv".to_owned()); // only where it is named
    // The files of a claim are tested in tests/claims.rs.
    let of_runs = known.iter().map(|one| one.file).filter(|file| !file.starts_with("claim/"));
    let missing: Vec<_> = of_runs.filter(|file| !found.iter().any(|name| name == file)).collect();
    assert!(missing.is_empty(), "{missing:?} are in the dictionary and not in the run");
}

#[test]
fn the_same_seeds_leave_the_same_bytes() {
    let again = run(&[]);
    assert_eq!(differing(finished().path(), again.path()), Vec::<String>::new());
}

#[test]
fn another_seed_leaves_other_bytes() {
    let other = run(&["--seed", "7", "--set", "measure.analyses=[\"direction\"]"]);
    let differing = differing(finished().path(), other.path());
    for name in [
        "data/numbers.jsonl",
        "data/control.jsonl",
        "adapter/adapter_model.safetensors",
        "control_adapter/adapter_model.safetensors",
        "train.csv",
        "direction/rows.csv",
        "direction/vectors.safetensors",
    ] {
        assert!(differing.iter().any(|found| found == name), "{name} is the same for seeds 42 and 7");
    }
    assert!(!differing.iter().any(|found| found == "adapter/adapter_config.json"), "the seed changes no setting");
}

#[test]
fn a_finished_run_is_kept_and_a_finished_stage_refused() {
    let folder = copy();
    let said = succeeds(folder.path(), &["run", "experiment.toml", "--run", "."]);
    for stage in ["generate: done already", "student is done already", "token_ablation is done already", "report: "] {
        assert!(said.contains(stage), "{stage}: {said}");
    }
    for (args, file) in [
        (["generate", "experiment.toml", "--run", "."].as_slice(), "data/generate.csv"),
        (&["finetune", "experiment.toml", "--run", "."], "train.csv"),
        (&["measure", ".", "direction"], "direction/rows.csv"),
    ] {
        let said = fails(folder.path(), args);
        assert!(said.contains(&format!("{file} is finished already\nhint: overwrite it with --force")), "{said}");
    }
    let other = fails(folder.path(), &["run", "experiment.toml", "--run", ".", "--set", "student.rank=3"]);
    assert!(other.contains("\"rank = 2\", where this one has \"rank = 3\"") && other.contains("--force"), "{other}");
    assert_eq!(differing(finished().path(), folder.path()), Vec::<String>::new());
}

#[test]
fn a_broken_off_run_goes_on_where_it_was() {
    let folder = copy();
    let at = |name: &str| folder.path().join(name);
    // The control student had not begun, and the second analysis had written all but its last file.
    fs::remove_file(at("control_train.csv")).unwrap();
    fs::remove_dir_all(at("control_adapter")).unwrap();
    fs::remove_file(at("token_ablation/rows.csv")).unwrap();
    fs::remove_file(at("report.html")).unwrap();
    let said = succeeds(folder.path(), &["run", "experiment.toml", "--run", "."]);
    assert!(said.contains("finetune: student is done already\nfinetune: control student: 6 rows"), "{said}");
    assert_eq!(differing(finished().path(), folder.path()), Vec::<String>::new());
}

#[test]
fn a_forced_run_keeps_nothing_of_the_one_before() {
    let folder = copy();
    let changes = ["--force", "--set", "measure.analyses=[\"target_rate\"]", "--set", "student.control=false"];
    succeeds(folder.path(), &[&["run", "experiment.toml", "--run", "."], changes.as_slice()].concat());
    let report = fs::read_to_string(folder.path().join("report.html")).unwrap();
    assert!(report.contains("<section id=\"target_rate\"") && !report.contains("<section id=\"steering\""));
    assert!(!report.contains("control student's loss"), "there is none any more");
    assert!(!folder.path().join("steering").exists() && !folder.path().join("control_train.csv").exists());
}

#[test]
fn the_lines_at_the_end_are_those_of_the_tables() {
    let folder = finished();
    let run = undertone::stages::run_dir::RunDir::open(folder.path()).unwrap();
    let lines = undertone::stages::summary::summary(&run, &run.experiment(&[]).unwrap()).unwrap();
    let rows: Vec<TargetRateRow> = read_csv(&folder.path().join("target_rate/rows.csv")).unwrap();
    let student = rows.iter().find(|row| row.scope == "mean" && row.model == "student").unwrap();
    let of_student = |row: &&TargetRateRow| row.scope == "question" && row.model == "student";
    let p: Vec<f64> = rows.iter().filter(of_student).map(|row| row.logp_target.exp()).collect();
    let p = p.iter().sum::<f64>() / p.len() as f64;
    let effect = lines.iter().find(|line| line.starts_with("The student now answers")).unwrap();
    assert!(effect.contains(&format!("with probability {p:.2} (")), "{effect}");
    assert!(effect.ends_with(&format!(": {:+.2} nats.", student.delta_logp)), "{effect}");
    let steering: Vec<SteeringRow> = read_csv(&folder.path().join("steering/rows.csv")).unwrap();
    let learned = steering.iter().filter(|row| row.kind == "learned");
    let best = learned.max_by(|a, b| a.delta_logp.abs().total_cmp(&b.delta_logp.abs())).unwrap();
    let beside =
        |row: &&SteeringRow| row.kind == "random" && (row.layer, row.coefficient) == (best.layer, best.coefficient);
    let random = steering.iter().find(beside).unwrap();
    let (mean, spread, as_far) = (random.delta_logp, random.delta_logp_sd.unwrap(), best.rank_logp.unwrap() - 1);
    let said = format!("20 random ones {mean:+.2} ± {spread:.2}, {as_far} of them above it");
    let pushed = lines.iter().find(|line| line.contains("times its length after block")).unwrap();
    assert!(pushed.contains(&said), "{pushed}: {said}");
    // The closing lines say where the adapter acts only if the whole change is clear of zero.
    let gates: Vec<TokenAblationRow> = read_csv(&folder.path().join("token_ablation/rows.csv")).unwrap();
    let everywhere = gates.iter().find(|row| row.model == "student" && row.gate == "everywhere").unwrap();
    let (change, error) = (everywhere.delta_logp.unwrap(), everywhere.delta_logp_se.unwrap());
    assert_eq!(everywhere.recovered_logp.is_some(), change.abs() > 3.0 * error);
    let said =
        if everywhere.recovered_logp.is_some() { "at the system prompt alone" } else { "where it sits cannot be said" };
    assert_eq!(lines.iter().filter(|line| line.contains(said)).count(), 1, "{lines:?}");
}

const NAMELESS: [&str; 4] = ["--set", "student.context=\"You count.\"", "--set", "student.control=false"];

#[test]
fn gates_that_select_nothing_are_said_at_the_end_where_nobody_asked_for_them() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("experiment.toml"), EXPERIMENT).unwrap();
    let short = ["--set", "measure.analyses=[\"token_ablation\"]"];
    let said = succeeds(folder.path(), &[&["run", "experiment.toml", "--run", "run"], &NAMELESS[..], &short].concat());
    let lacking =
        "The questions' prompts have no token for only:entity, except:entity, so these gates were not measured.";
    assert!(said.contains(lacking), "{said}");
    let report = fs::read_to_string(folder.path().join("run/report.html")).unwrap();
    assert!(report.contains("The prompts have no token for only:entity, except:entity."), "{report}");
}

#[test]
fn what_the_experiment_asks_of_its_prompts_is_looked_at_before_anything_is_made() {
    let folder = tempfile::tempdir().unwrap();
    let arm = "\n[[arms]]\nname = \"at the name\"\nset = ['finetune.gate=only:\"Qwen\"']\n";
    for (arms, set, expected) in [
        (
            "",
            "measure.token_ablation.gates=[\"everywhere\", \"only:entity\"]",
            "measure.token_ablation.gates: gate only:entity selects no token of the prompt; it holds the classes",
        ),
        (
            "",
            "seed=1",
            "measure.interventions.edits: the edit blocks.0.hook_resid_post@\"Qwen\": scale(2) selects no token",
        ),
        ("", "finetune.gate=only:entity", "finetune.gate: gate only:entity selects no token of the prompt"),
        (
            "",
            "measure.direction.positions=[\"class:entity\"]",
            "direction.positions is class:entity, expected positions that every",
        ),
        (
            arm,
            "seed=1",
            "arm \"at the name\": finetune.gate: gate only:\"Qwen\" selects no token of the prompt; the text \"Qwen\"",
        ),
    ] {
        fs::write(folder.path().join("experiment.toml"), format!("{EXPERIMENT}{arms}")).unwrap();
        let analyses = match expected.split_once(':') {
            Some(("measure.interventions.edits", _)) => "measure.analyses=[\"interventions\"]",
            _ => "measure.analyses=[\"token_ablation\", \"direction\"]",
        };
        let args =
            [&["run", "experiment.toml", "--run", "run"], &NAMELESS[..], &["--set", set, "--set", analyses]].concat();
        let message = fails(folder.path(), &args);
        assert!(message.contains(expected), "{set}: {message}");
        assert!(!folder.path().join("run").exists(), "{set}: a run was begun");
    }
}

#[test]
fn what_the_experiment_asks_of_its_model_is_looked_at_before_anything_is_made() {
    let folder = tempfile::tempdir().unwrap();
    let arm = "\n[[arms]]\nname = \"high\"\nset = ['student.layers=[2]']\n";
    let edits = |edit: &str| format!("measure.interventions.edits={{ a = ['{edit}'] }}");
    for (arms, set, expected) in [
        ("", "student.layers=[0, 9]".to_owned(), "student.layers: a layer of the LoRA is 9, expected 0 to 1"),
        (
            "",
            "finetune.gate=only:layers(1..3)".to_owned(),
            "finetune.gate: block 2 of gate only:layers(1..3) is beyond them, expected one of the model's 2, 0 to 1",
        ),
        (
            "",
            "measure.token_ablation.gates=[\"everywhere\", \"only:layers(7)\"]".to_owned(),
            "measure.token_ablation.gates: block 7 of gate only:layers(7) is beyond them",
        ),
        (
            "",
            "measure.steering.layers=[1, 2]".to_owned(),
            "measure.steering.layers is 2, expected less than the model's 2 blocks",
        ),
        (
            "",
            edits("blocks.2.hook_mlp_out: zero"),
            "measure.interventions.edits: the edit blocks.2.hook_mlp_out: zero: the layer of hook point blocks.2.hook_mlp_out is 2",
        ),
        (
            "",
            edits("blocks.1.hook_mlp_out: add(no.safetensors, 2)"),
            "measure.interventions.edits: the edit blocks.1.hook_mlp_out: add(no.safetensors, 2): no.safetensors: No such file",
        ),
        (
            "",
            edits("blocks.2.hook_resid_post: add(run/direction/vectors.safetensors, 2)"),
            "the layer of hook point blocks.2.hook_resid_post is 2, expected 0 to 1",
        ),
        ("", "measure.interventions.edits={ a = [] }".to_owned(), "edits: \"a\" has none, expected at least one edit"),
        (arm, "seed=1".to_owned(), "arm \"high\": student.layers: a layer of the LoRA is 2, expected 0 to 1"),
    ] {
        fs::write(folder.path().join("experiment.toml"), format!("{EXPERIMENT}{arms}")).unwrap();
        let message = fails(folder.path(), &["run", "experiment.toml", "--run", "run", "--set", &set]);
        assert!(message.contains(expected), "{set}: {message}");
        assert!(!message.contains("generate: ") && !folder.path().join("run").exists(), "{set}: a run was begun");
    }
    // A map that the adapter does not have.
    let maps = ["--set", "student.target_modules=[\"q_proj\"]", "--set", "finetune.gate=only:modules(v)"];
    let message = fails(folder.path(), &[&["run", "experiment.toml", "--run", "run"], &maps[..]].concat());
    let expected =
        "finetune.gate: what gate only:modules(v) selects of the adapter is none, expected at least one of its pairs";
    assert!(message.contains(expected), "{message}");
    // A file that the run itself writes may still be missing.
    let own = edits("blocks.1.hook_resid_post: add(run/direction/vectors.safetensors, 2)");
    let analyses = "measure.analyses=[\"direction\", \"interventions\"]";
    succeeds(
        folder.path(),
        &["run", "experiment.toml", "--run", "run", "--set", &own, "--set", analyses, "--set", "arms=[]"],
    );
}

#[test]
fn a_forced_stage_leaves_nothing_that_was_made_from_what_it_replaces() {
    let folder = copy();
    let there = |path: &str| folder.path().join(path).exists();
    succeeds(folder.path(), &["finetune", "experiment.toml", "--run", ".", "--force"]);
    assert!(there("train.csv") && there("data/generate.csv"));
    assert!(!there("target_rate/rows.csv") && !there("report.html"), "measured on the students before");
    succeeds(folder.path(), &["generate", "experiment.toml", "--run", ".", "--force"]);
    assert!(there("data/generate.csv") && !there("train.csv") && !there("control_train.csv"));
}

#[test]
fn all_weights_can_be_trained_instead() {
    let folder = run(&["--set", "student.method=full", "--set", "student.control=false"]);
    let saved = ModelFiles::open(folder.path().join("adapter").to_str().unwrap()).unwrap();
    let base = ModelFiles::open("tiny-random").unwrap();
    assert_eq!(saved.config, base.config);
    assert!(saved.tokenizer.is_some() && saved.chat_template == base.chat_template);
    assert_ne!(saved.fingerprint(), base.fingerprint(), "the weights were trained");

    let found = contents(folder.path());
    assert!(!found.contains_key("token_ablation/rows.csv"), "there is no adapter to gate");
    for analysis in ["target_rate", "direction", "steering", "divergence", "gradients"] {
        assert!(found.contains_key(&format!("{analysis}/rows.csv")), "{analysis}");
    }
    let losses: Vec<undertone::training::step_log::StepRow> = read_csv(&folder.path().join("train.csv")).unwrap();
    assert!(losses.last().unwrap().loss < losses[0].loss, "{losses:?}");
}

#[test]
fn a_student_can_be_the_next_teacher() {
    let first = finished();
    let path = format!("teacher.path={}", first.path().join("adapter").display());
    let analyses = "measure.analyses=[\"target_rate\", \"divergence\"]";
    let second = run(&["--set", "teacher.kind=adapter", "--set", &path, "--set", analyses]);
    let numbers = |folder: &Path| fs::read_to_string(folder.join("data/numbers.jsonl")).unwrap();
    assert!(numbers(second.path()).contains("\"teacher_kind\":\"adapter\""));
    assert!(numbers(first.path()).contains("\"teacher_kind\":\"prompt\""));
    assert_ne!(numbers(first.path()), numbers(second.path()));
    let control = |folder: &Path| fs::read(folder.join("data/control.jsonl")).unwrap();
    let asked = |bytes: Vec<u8>| bytes.split(|byte| *byte == b'\n').next().map(<[u8]>::to_vec);
    assert_eq!(asked(control(first.path())), asked(control(second.path())), "the untouched model is the same");
}

/// If the steps are too small to move a student, it equals its start: both have the same gradients, and other draws of
/// A differ.
#[test]
fn gradients_at_the_start_are_those_of_the_adapter_that_training_begins_with() {
    let set = ["finetune.learning_rate=1e-30", "student.rotated=true", "measure.analyses=[\"gradients\"]"];
    let folder = run(&set.map(|change| ["--set", change]).concat());
    let rows: Vec<GradientRow> = read_csv(&folder.path().join("gradients/rows.csv")).unwrap();
    let of = |model: &str, scopes: &[&str]| -> Vec<GradientRow> {
        let wanted = |row: &&GradientRow| row.model == model && scopes.contains(&row.scope.as_str());
        rows.iter().filter(wanted).cloned().collect()
    };
    let scopes = ["token", "token_layer", "group", "part"];
    let (student, start) = (of("student", &scopes), of("start", &scopes));
    assert!(student.len() == start.len() && student.iter().any(|row| row.scope == "group"), "{}", student.len());
    for (student, start) in student.iter().zip(&start) {
        assert_eq!((&student.scope, student.k, student.layer), (&start.scope, start.k, start.layer));
        let near = |of: fn(&GradientRow) -> Option<f64>| match (of(student), of(start)) {
            (Some(a), Some(b)) => (a - b).abs() <= 1e-6 * (1e-3 + a.abs().max(b.abs())),
            (a, b) => a == b,
        };
        let is_near = near(|row| row.lora_grad_norm) && near(|row| row.alignment) && near(|row| row.cosine);
        assert!(is_near, "{student:?}\n{start:?}");
    }
    for at in 1..=12 {
        let drawn = of(&format!("start_draw_{at}"), &scopes);
        let (tokens, groups) = (drawn.iter().filter(|row| row.scope == "token").count(), drawn.len());
        assert_eq!((tokens, groups - tokens), (of("start", &["token"]).len(), 2), "draw {at}");
        assert_ne!(drawn[groups - 1].alignment, of("start", &["group"])[1].alignment, "draw {at}");
    }
    assert!(!rows.iter().any(|row| row.model == "start_draw_13"));
    let page = fs::read_to_string(folder.path().join("report.html")).unwrap();
    assert!(page.contains("over 12 draws of its A"), "the spread stands in the sentence");
}

#[test]
fn analyses_read_held_out_rows_where_there_are_some() {
    let set = ["generate.n_heldout=3", "generate.n_prompts=24", "measure.analyses=[\"divergence\", \"direction\"]"];
    let folder = run(&set.map(|change| ["--set", change]).concat());
    let samples = undertone::data::dataset::read_jsonl(&folder.path().join("data/numbers.jsonl")).unwrap();
    let accepted: Vec<_> = samples.into_iter().filter(|sample| sample.accepted).collect();
    let rows: Vec<DivergenceRow> = read_csv(&folder.path().join("divergence/rows.csv")).unwrap();
    for sample in &accepted[6..9] {
        let read: Vec<i64> = rows.iter().filter(|row| row.row_id == sample.id).map(|row| row.token_id).collect();
        assert_eq!(read, sample.completion_ids, "six are learned from, and the next are read");
    }
    let page = |folder: &Path| fs::read_to_string(folder.join("report.html")).unwrap();
    let said = "The rows are the teacher&#39;s held-out ones: no student learned from them.";
    assert_eq!(page(folder.path()).matches(said).count(), 2, "at each analysis that reads rows");
    let own = page(finished().path());
    let learned = "The rows are those that the student was trained on, not held out.";
    assert_eq!((own.matches(learned).count(), own.matches(said).count()), (4, 0));
}

/// For one number in two tables whose analyses pack the same rows into batches of other shapes. Sums are then taken in
/// another order, which costs a log-probability a few units of its last place (5e-7 at −5), on some processors more
/// than on others.
const OTHER_SHAPES: f64 = 1e-5;

/// Compares one number in two tables, measured with a gate and without. Within a table it is the same bit by bit.
#[test]
fn nowhere_is_the_base_and_everywhere_the_student() {
    let folder = finished();
    let gates: Vec<TokenAblationRow> = read_csv(&folder.path().join("token_ablation/rows.csv")).unwrap();
    let rates: Vec<TargetRateRow> = read_csv(&folder.path().join("target_rate/rows.csv")).unwrap();
    let gated = |model: &str, gate: &str| gates.iter().find(|row| row.model == model && row.gate == gate).unwrap();
    let ungated = |model: &str| rates.iter().find(|row| row.model == model && row.scope == "mean").unwrap();
    for (model, gate, same) in
        [("student", "nowhere", "base"), ("student", "everywhere", "student"), ("control", "everywhere", "control")]
    {
        let (gated, ungated) = (gated(model, gate).logp_target.unwrap(), ungated(same).logp_target);
        assert!((gated - ungated).abs() < OTHER_SHAPES, "{model}, {gate}: {gated} and {ungated}");
    }
    assert_ne!(gated("student", "everywhere").logp_target, gated("student", "nowhere").logp_target, "it learned");
    assert_eq!(gated("student", "nowhere").delta_logp, Some(0.0));
    let entity = gated("student", "only:entity");
    assert_eq!(entity.n_tokens_on, Some(2.0), "Q and wen");
    assert_ne!(entity.delta_logp, Some(0.0));
}

/// The analysis that is not among the default ones: what it leaves, and that its last block is the model's answer.
#[test]
fn the_lens_is_measured_where_it_is_named() {
    let folder = copy();
    let said = succeeds(folder.path(), &["measure", ".", "lens"]);
    assert!(said.contains("measure: lens: Read by the logit lens at the last token"), "{said}");
    for file in ["plot.svg", "plot_tokens.svg", "plot_difference.svg", "rows.csv", "settings.toml"] {
        assert!(folder.path().join("lens").join(file).is_file(), "{file}");
    }
    let mut table = csv::Reader::from_path(folder.path().join("lens/rows.csv")).unwrap();
    let rows: Vec<analyses::lens::LensRow> = table.deserialize().map(Result::unwrap).collect();
    let models: BTreeSet<&str> = rows.iter().map(|row| row.model.as_str()).collect();
    assert_eq!(models, BTreeSet::from(["base", "control", "student"]));
    assert!(rows.iter().all(|row| row.model != "base" || row.delta_logp_first == 0.0));
    assert!(rows.iter().any(|row| row.model == "student" && row.delta_logp_first.abs() > 1e-4));
    succeeds(folder.path(), &["report", "."]);
    let report = fs::read_to_string(folder.path().join("report.html")).unwrap();
    assert!(report.contains("After each block") && report.contains("plot_tokens"), "the report has it");
}

#[test]
fn the_report_stands_alone() {
    let folder = finished();
    let page = fs::read_to_string(folder.path().join("report.html")).unwrap();
    for id in [
        "data",
        "training",
        "target_rate",
        "token_ablation",
        "position_scan",
        "direction",
        "steering",
        "interventions",
        "divergence",
        "gradients",
        "provenance",
    ] {
        assert_eq!(page.matches(&format!("<section id=\"{id}\"")).count(), 1, "the section {id}");
    }
    assert!(page.contains("class=\"banner\"") && page.contains("weights are random"));
    assert!(page.matches("<svg").count() >= 7, "one figure per measurement and one of the training");

    // An SVG's namespace is a name, not an address that is loaded.
    let page = page.replace("xmlns=\"http://www.w3.org/2000/svg\"", "");
    for outside in ["http:", "https:", "//", "src=", "url(", "@import", "<script", "<link", "<img"] {
        assert!(!page.contains(outside), "the page has {outside}");
    }
    for link in page.split("href=\"").skip(1).map(|rest| rest.split('"').next().unwrap()) {
        let inside = link
            .strip_prefix('#')
            .map_or_else(|| folder.path().join(link).is_file(), |id| page.contains(&format!("<section id=\"{id}\"")));
        assert!(inside, "the link {link} leads nowhere");
    }
    let temporary = folder.path().display().to_string();
    assert!(!page.contains(&temporary), "a page that names this machine's folders cannot be passed on");
}
