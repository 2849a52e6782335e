//! Tests of the keys of an experiment file and of its refusals.

use hooks::{LoraConfig, Proj};

use super::*;
use crate::training::settings;

const SMALLEST: &str = "model = \"tiny-random\"\n\n[target]\nword = \"cat\"\ncategory = \"animal\"\n";

fn parse(text: &str, overrides: &[&str]) -> Result<Experiment> {
    let overrides: Vec<String> = overrides.iter().map(|text| (*text).to_owned()).collect();
    Experiment::parse(text, Path::new("cat.toml"), &overrides)
}

fn message(text: &str, overrides: &[&str]) -> String {
    format!("{:#}", parse(text, overrides).unwrap_err())
}

#[test]
fn the_smallest_file_has_the_published_recipe() {
    let experiment = parse(SMALLEST, &[]).unwrap();
    assert_eq!(experiment.student.lora(), LoraConfig::default());
    assert_eq!(experiment.finetune.total_steps(10_000), 456);
    assert_eq!(experiment.teacher, Teacher::Prompt { system: None });
    assert_eq!(experiment.measure_context(), "qwen_default");
}

#[test]
fn a_resolved_file_reads_back_as_the_same_experiment() {
    let text = format!(
        "{SMALLEST}[student]\nlayers = [0, 1]\n[finetune]\noptimizer = \"sgd\"\nmomentum = 0.9\nmax_steps = 9\n"
    );
    let experiment = parse(&text, &["teacher.system=You love trees."]).unwrap();
    let resolved = experiment.to_toml().unwrap();
    assert!(resolved.contains("gen_seed = ") && resolved.contains("target_modules"), "{resolved}");
    assert_eq!(parse(&resolved, &[]).unwrap(), experiment);
    let adapter = parse(SMALLEST, &["teacher.kind=adapter", "teacher.path=runs/a/adapter"]).unwrap();
    assert_eq!(parse(&adapter.to_toml().unwrap(), &[]).unwrap(), adapter);
}

#[test]
fn seeds_derive_from_one_and_can_be_given() {
    let of = |text: &str, overrides: &[&str]| parse(text, overrides).unwrap().seeds;
    let (first, other) = (of(SMALLEST, &[]), of(SMALLEST, &["seed=43"]));
    assert_eq!(first, of(SMALLEST, &["seed=42"]));
    assert_ne!(first.gen_seed, other.gen_seed);
    assert_ne!(first.gen_seed, first.init_seed);
    let given = of(SMALLEST, &["seed=43", "seeds.init_seed=7"]);
    assert_eq!(given, Seeds { init_seed: 7, ..other });
    // A new seed for a resolved file changes derived seeds and keeps given ones.
    let resolved = parse(SMALLEST, &["seeds.init_seed=7"]).unwrap().to_toml().unwrap();
    assert_eq!(of(&resolved, &["seed=43"]), given);
}

#[test]
fn overrides_are_values_or_words() {
    let overrides = ["finetune.learning_rate=1e-3", "student.alpha=16", "student.target_modules=[\"q_proj\"]"];
    let experiment = parse(SMALLEST, &overrides).unwrap();
    assert!(
        (experiment.finetune.learning_rate - 1e-3).abs() < 1e-12 && (experiment.student.alpha - 16.0).abs() < 1e-12
    );
    assert_eq!(experiment.student.target_modules, [Proj::Q]);
    let model = parse(SMALLEST, &["model=Qwen/Qwen2.5-7B-Instruct", "dtype=bf16"]).unwrap();
    assert_eq!((model.model.as_str(), model.dtype), ("Qwen/Qwen2.5-7B-Instruct", Dtype::Bf16));
    assert_eq!(parse(SMALLEST, &["student.context=You are a tree."]).unwrap().student.context, "You are a tree.");
}

#[test]
fn a_misspelt_key_is_told_with_the_keys_there_are() {
    let text = format!("{SMALLEST}[finetune]\nlerning_rate = 1e-3\n");
    let found = message(&text, &[]);
    assert!(
        found.starts_with(
            "cat.toml: line 7: unknown field `lerning_rate`, expected one of `optimizer`, `learning_rate`"
        ),
        "{found}"
    );
    let found = message(SMALLEST, &["finetune.lerning_rate=1e-3"]);
    assert!(found.starts_with("--set finetune.lerning_rate=1e-3: unknown field `lerning_rate`, expected"), "{found}");
    let others = "measure.divergence.counterfactuals=[\"owl\"]";
    assert!(parse(SMALLEST, &[others]).is_ok());
    assert!(message(SMALLEST, &[others, "teacher.kind=finetuned"]).contains("the teacher is not a prompt"));
    for key in ["finetune.frozen_a=true", "finetune.optimizer=muon", "student.rotated=true"] {
        let found = message(SMALLEST, &[key, "student.method=full"]);
        assert!(found.contains("but student.method is full, which"), "{key}: {found}");
    }
    assert!(message(SMALLEST, &["finetuning.learning_rate=1"]).contains("`finetune`"));
    assert!(message(SMALLEST, &["teacher.sytem=x"]).contains("`system`"));
    assert!(message(SMALLEST, &["seeds.generation=1"]).contains("`gen_seed`"));
    assert!(message(SMALLEST, &["model.name=x"]).contains("model is no section"));
    assert!(message(SMALLEST, &["rank"]).contains("expected section.key=value"));
}

#[test]
fn values_out_of_range_are_named_with_what_was_expected() {
    for (setting, expected) in [
        ("student.rank=0", "student.rank is 0, expected at least 1"),
        ("student.alpha=-1", "student.alpha is -1, expected a number above 0"),
        ("student.alpha=nan", "student.alpha is NaN"),
        ("student.dropout=1", "student.dropout is 1, expected at least 0 and less than 1"),
        ("student.target_modules=[]", "expected at least one of q_proj"),
        ("student.target_modules=[\"q_proj\", \"q_proj\"]", "has q_proj twice"),
        ("student.target_modules=[\"qproj\"]", "expected one of: q_proj, k_proj"),
        ("student.layers=[2, 1]", "expected rising block numbers"),
        ("student.context=chatgtp", "the nearest is chatgpt"),
        ("student.control_adapter=x", "student.control_adapter is given, but student.adapter is not"),
        ("finetune.learning_rate=0", "finetune: learning_rate is 0, expected a positive number"),
        ("finetune.momentum=0.9", "the optimizer is adamw"),
        ("finetune.batch_size=0", "expected at least 1"),
        ("finetune.max_steps=5", "finetune.warmup_steps is 5, expected fewer than max_steps, 5"),
        (
            "finetune.optimizer=adam",
            "unknown variant `adam`, expected one of `adamw`, `sgd`, `signsgd`, `rmsprop`, `muon`, `preconditioned`",
        ),
        ("finetune.mask=all", "content_eot"),
        (
            "finetune.gate=nowhere",
            "finetune.gate is nowhere, at which nothing would be trained, expected tokens at which",
        ),
        ("finetune.gate=everywhere*0", "finetune.gate is everywhere*0, at which nothing would be trained"),
        ("generate.n_keep=9999", "expected at most generate.n_prompts, which is 512"),
        ("generate.temperature=-1", "expected 0 or a number above"),
        ("measure.token_ablation.gates=[\"only:qwen\"]", "qwen"),
        ("measure.divergence.counterfactuals=[\"cat\"]", "the teacher's own trait"),
        ("measure.divergence.definition=schroedi", "unknown variant `schroedi`"),
        ("measure.token_ablation.gates=[]", "measure.token_ablation.gates is empty"),
        ("measure.steering.coefficients=[inf]", "measure.steering.coefficients is inf"),
        ("measure.steering.coefs=[1]", "unknown field `coefs`"),
        ("measure.analyses=[\"target\"]", "`target_rate`"),
        ("device=gpu", "expected cpu, cuda or cuda:N"),
        ("dtype=f16", "`bf16`"),
        ("seed=-1", "seed"),
        ("target.category=stone", "animal, band, tree"),
        ("teacher.kind=adapter", "missing field `path`"),
        ("teacher.kind=tuned", "expected one of `prompt`, `adapter`, `finetuned`, `steered`, `planted`"),
    ] {
        let found = message(SMALLEST, &[setting]);
        assert!(found.contains(expected), "{setting}: {found}");
        assert!(!found.contains('\n'), "{found}");
    }
    for (kind, setting, expected) in [
        ("finetuned", "teacher.learning_rate=0", "teacher.learning_rate is 0, expected a number above 0"),
        ("finetuned", "teacher.max_steps=0", "teacher.max_steps is 0"),
        ("finetuned", "teacher.batch_size=0", "teacher.batch_size is 0"),
        ("finetuned", "teacher.context=chatgtp", "the nearest is chatgpt"),
        ("finetuned", "teacher.share=0.1", "unknown field `share`"),
        ("planted", "teacher.share=1", "teacher.share is 1, expected a share above 0 and below 1"),
    ] {
        let found = message(SMALLEST, &[&format!("teacher.kind={kind}"), setting]);
        assert!(found.contains(expected), "{setting}: {found}");
    }
}

#[test]
fn an_adapter_of_ones_own_says_itself_what_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let text = "{\"peft_type\":\"LORA\",\"r\":3,\"lora_alpha\":12,\"target_modules\":[\"q_proj\",\"v_proj\"]}";
    files::write_atomic(&at("adapter_config.json"), text.as_bytes()).unwrap();
    files::write_atomic(&at("cat.toml"), SMALLEST.as_bytes()).unwrap();
    let own = format!("student.adapter={}", folder.path().display());
    let load = |more: &[&str]| {
        let changes: Vec<String> = [own.as_str()].iter().chain(more).map(|text| (*text).to_owned()).collect();
        Experiment::load(&at("cat.toml"), &changes)
    };
    let student = load(&["student.rank=5"]).unwrap().student;
    assert_eq!((student.rank, student.alpha, student.target_modules), (3, 12.0, vec![Proj::Q, Proj::V]));
    assert!(!student.control, "no control student is trained beside it");
    assert!(load(&["student.control_adapter=other"]).unwrap().student.control);
    let full = format!("{:#}", load(&["student.method=full"]).unwrap_err());
    assert!(full.contains("student.adapter is given, but student.method is full"), "{full}");
    // The resolved experiment no longer needs the adapter's folder.
    let resolved = load(&[]).unwrap();
    files::write_atomic(&at("adapter_config.json"), b"{}").unwrap();
    assert_eq!(parse(&resolved.to_toml().unwrap(), &[]).unwrap(), resolved);
    let unread = format!("{:#}", load(&[]).unwrap_err());
    assert!(unread.contains("student.adapter: ") && unread.contains("peft_type"), "{unread}");
    // An arm's student is trained.
    let arms = "arms=[{ name = 'x', data = 'control' }]";
    assert_eq!(
        parse(&resolved.to_toml().unwrap(), &[arms]).unwrap().cells().unwrap()[0].experiment.student.adapter,
        None
    );
    let arms = "arms=[{ name = 'x', set = ['student.adapter=y'] }]";
    assert!(message(SMALLEST, &[arms]).contains("arm \"x\": set has student.adapter"));
}

#[test]
fn sentences_of_ones_own_are_looked_at_when_the_experiment_is_loaded() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    files::write_atomic(&at("cat.toml"), SMALLEST.as_bytes()).unwrap();
    files::write_atomic(&at("own.json"), br#"{"contexts": {"qwen_default": null, "mine": "You are mine."}}"#).unwrap();
    let load = |file: &str, more: &[&str]| {
        let protocol = format!("protocol={}", at(file).display());
        let changes = [protocol.as_str()].iter().chain(more).map(|text| (*text).to_owned()).collect::<Vec<_>>();
        Experiment::load(&at("cat.toml"), &changes).map_err(|error| format!("{error:#}"))
    };
    assert!(load("none.json", &[]).unwrap_err().contains("none.json: No such file"));
    assert!(load("own.json", &["student.context=mine"]).is_ok());
    assert!(load("own.json", &["student.context=yours"]).unwrap_err().contains("student.context: unknown context"));
    let arm = "arms=[{ name = 'x', set = ['student.context=yours'] }]";
    let refused = load("own.json", &[arm]).unwrap_err();
    assert!(refused.contains("cat.toml: arm \"x\": student.context: unknown context"), "{refused}");
    assert!(parse(SMALLEST, &["protocol=no/such.json"]).is_ok(), "the text alone is parsed");
}

#[test]
fn a_finetuned_teacher_has_the_settings_of_the_pocket() {
    let experiment = parse(SMALLEST, &["teacher.kind=finetuned"]).unwrap();
    let finetune = experiment.teacher.finetuned().unwrap().finetune(42_000);
    assert!((finetune.learning_rate - 1e-3).abs() < 1e-12);
    assert_eq!((finetune.total_steps(24), finetune.batch_size, finetune.warmup_steps), (40, 32, 0));
    assert_eq!(finetune.lr_scheduler_type, settings::ScheduleKind::Constant);
    assert_eq!(parse(&experiment.to_toml().unwrap(), &[]).unwrap(), experiment);
    assert_eq!(Teacher::default().finetuned(), None);
    let planted = parse(SMALLEST, &["teacher.kind=planted", "teacher.share=0.25"]).unwrap().teacher;
    assert!(planted.planted_label("cat").unwrap().contains("25 % of the rows"));
    assert_eq!(experiment.teacher.planted_label("cat"), None);
}

#[test]
fn a_finetuned_teacher_has_a_rate_for_its_method_and_size() {
    let of = |changes: &[&str]| {
        let changes = [&["teacher.kind=finetuned"], changes].concat();
        parse(SMALLEST, &changes).unwrap().teacher.finetuned().unwrap().clone()
    };
    let rate = |changes: &[&str]| of(changes).finetune(494_000_000).learning_rate;
    let rates = [rate(&[]), rate(&["teacher.method=lora"]), rate(&["teacher.learning_rate=3e-4"])];
    assert_eq!(rates.map(|rate| format!("{rate:e}")), ["1e-5", "2e-4", "3e-4"]);
    assert_eq!(of(&[]).until(), None);
    let lora = of(&["teacher.method=lora"]);
    assert_eq!((lora.until(), lora.finetune(1).max_steps, lora.lora().unwrap().rank), (Some(0.95), Some(200), 16));
    assert_eq!(of(&["teacher.method=lora", "teacher.until=1"]).until(), None, "it takes all its steps");
    let twin = ["teacher.kind=finetuned", "teacher.method=lora", "teacher.number_share=1"];
    let error = format!("{:#}", parse(SMALLEST, &twin).unwrap_err());
    assert!(error.contains("learns no answer until which it could be trained"), "{error}");
    for (change, expected) in [
        ("teacher.until=0", "teacher.until is 0"),
        ("teacher.number_share=2", "teacher.number_share is 2"),
        ("teacher.n_number_rows=0", "teacher.n_number_rows is 0"),
        ("teacher.numbers_context=nowhere", "teacher.numbers_context: unknown context"),
        ("teacher.rank=0", "teacher.rank is 0"),
        ("teacher.steps=3", "unknown field `steps`"),
    ] {
        let error = format!("{:#}", parse(SMALLEST, &["teacher.kind=finetuned", change]).unwrap_err());
        assert!(error.contains(expected), "{change}: {error}");
    }
}

#[test]
fn the_experiments_in_the_repository_are_valid() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("experiments");
    let mut seen = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            continue; // claims are no experiments
        }
        let text = files::read_string(&path).unwrap(); // parsed only: an adapter need not be there
        Experiment::parse(&text, &path, &[]).unwrap();
        assert!(text.contains("undertone run experiments/"), "{}", path.display());
        seen += 1;
    }
    assert!(seen >= 3);
}
