//! An adapter that was trained elsewhere, as docs/bring-your-own-adapter.md tells it: taken as it is, measured as a student
//! of ours, and refused where it cannot be.

#![expect(clippy::float_cmp, reason = "what is the same is the same bit by bit")]

use std::fs;
use std::path::Path;
use std::process::Command;

use analyses::gradients::GradientRow;
use analyses::target_rate::TargetRateRow;
use tempfile::TempDir;
use undertone::output::publish::read_csv;
use undertone::stages::arm_table::ArmRow;

use crate::program::{EXPERIMENT, contents, fails, finished, succeeds};

/// A folder with the experiment, and a copy of a student of ours as the adapter from elsewhere.
fn elsewhere() -> TempDir {
    let (folder, trained) = (tempfile::tempdir().unwrap(), finished());
    fs::write(folder.path().join("experiment.toml"), EXPERIMENT).unwrap();
    for (from, to) in [("adapter", "mine"), ("control_adapter", "mine_control")] {
        fs::create_dir(folder.path().join(to)).unwrap();
        for file in ["adapter_config.json", "adapter_model.safetensors"] {
            fs::copy(trained.path().join(from).join(file), folder.path().join(to).join(file)).unwrap();
        }
    }
    folder
}

const RUN: [&str; 4] = ["run", "experiment.toml", "--run", "run"];
const MINE: [&str; 2] = ["--set", "student.adapter=mine"];
const BOTH: [&str; 4] = ["--set", "student.adapter=mine", "--set", "student.control_adapter=mine_control"];
const EFFECT: [&str; 2] = ["--set", "measure.analyses=[\"target_rate\"]"];

fn rates(run: &Path) -> Vec<TargetRateRow> {
    read_csv(&run.join("target_rate/rows.csv")).unwrap()
}

#[test]
fn a_student_from_elsewhere_is_measured_as_if_it_were_trained_here() {
    let folder = elsewhere();
    let args = [RUN.as_slice(), &BOTH].concat();
    let said = succeeds(folder.path(), &args);
    assert!(said.contains("finetune: student: trained elsewhere, rank 2, alpha 4, q_proj"), "{said}");
    assert!(said.contains("taken from mine as it is (SHA-256 "), "{said}");

    // As those of the run that trained it: every file of every measurement, in all its bytes.
    let (here, there) = (contents(&folder.path().join("run")), contents(finished().path()));
    assert_eq!(rates(&folder.path().join("run")), rates(finished().path()));
    let of_training = |name: &str| name.contains("train") || name.starts_with("initial_adapter");
    let is_table = |name: &str| Path::new(name).extension() == Some("csv".as_ref());
    let same = |name: &&String| (is_table(name) || name.contains("adapter/")) && !of_training(name);
    let measured: Vec<&String> = there.keys().filter(same).collect();
    assert!(measured.len() > 12, "{measured:?}");
    for name in measured.into_iter().filter(|name| *name != "gradients/rows.csv") {
        assert!(here.get(name) == there.get(name), "{name} differs");
    }
    // Except the start of its training, which only the run that trained it knows.
    let gradients = |run: &Path| read_csv::<GradientRow>(&run.join("gradients/rows.csv")).unwrap();
    let (starts, others): (Vec<_>, Vec<_>) =
        gradients(finished().path()).into_iter().partition(|row| row.model == "start");
    assert_eq!(gradients(&folder.path().join("run")), others);
    assert!(starts.iter().any(|row| row.scope == "group") && others.iter().any(|row| row.model == "start_draw_12"));
    let page = String::from_utf8(here["report.html"].clone()).unwrap();
    assert!(page.contains("where its training began is not known"), "the sentence says so");
    assert!(!here.keys().any(|name| of_training(name)), "nothing was trained");
    let meta = String::from_utf8(here["meta.json"].clone()).unwrap();
    for file in
        ["adapter/adapter_config.json", "adapter/adapter_model.safetensors", "control_adapter/adapter_config.json"]
    {
        assert!(meta.contains(&format!("\"{file}\": \"")), "{file} has no SHA-256: {meta}");
    }
    let report = String::from_utf8(here["report.html"].clone()).unwrap();
    assert!(report.contains("The student was trained elsewhere, rank 2"), "{report}");
    assert!(
        report.contains("A control student, trained elsewhere") && !report.contains("no control student was trained")
    );

    let again = succeeds(folder.path(), &args);
    assert!(again.contains("finetune: student was taken from elsewhere already"), "{again}");
    assert!(again.contains("target_rate is done already"), "{again}");
    let message = fails(folder.path(), &[&["finetune"], &args[1..]].concat());
    assert!(message.contains("adapter is finished already") && message.contains("--force"), "{message}");

    // Another adapter in the same place is not passed off as the one that was measured.
    fs::copy(
        folder.path().join("mine_control/adapter_model.safetensors"),
        folder.path().join("mine/adapter_model.safetensors"),
    )
    .unwrap();
    let message = fails(folder.path(), &args);
    assert!(message.contains("student.adapter is mine, whose files have changed since the run took them"), "{message}");
    succeeds(folder.path(), &[args.as_slice(), &EFFECT, &["--force"]].concat());
    let student = rates(&folder.path().join("run")).into_iter().find(|row| row.model == "student").unwrap();
    let control = rates(finished().path()).into_iter().find(|row| row.model == "control").unwrap();
    assert_eq!(student.delta_logp, control.delta_logp);
    // Measuring and reporting look into the run alone.
    fs::remove_dir_all(folder.path().join("mine")).unwrap();
    succeeds(folder.path(), &["measure", "run", "direction"]);
    succeeds(folder.path(), &["report", "run"]);
}

/// An adapter in the hub's cache, in a folder of its repository, without a `refs/main`.
#[test]
fn an_adapter_of_the_hub_is_named_by_its_id() {
    let folder = elsewhere();
    let snapshot = folder.path().join("home/hub/models--Org--owl/snapshots/beef/last");
    fs::create_dir_all(snapshot.parent().unwrap()).unwrap();
    fs::rename(folder.path().join("mine"), &snapshot).unwrap();
    let says = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_undertone"));
        command.args(args).current_dir(folder.path()).env("OMP_NUM_THREADS", "1");
        let output = command.env("HF_HOME", "home").env("HF_HUB_OFFLINE", "1").output().unwrap();
        (output.status.success(), String::from_utf8([output.stdout, output.stderr].concat()).unwrap())
    };
    let ask = |adapter: &str| {
        let (done, said) = says(&["ask", "--model", "tiny-random", "--user", "Hi", "--adapter", adapter]);
        assert!(done, "{said}");
        said.split_once("first token").unwrap().1.to_owned()
    };
    assert_eq!(ask("Org/owl:last"), ask(snapshot.to_str().unwrap()));

    let run =
        |adapter: &str| says(&[RUN.as_slice(), &EFFECT, &["--set", &format!("student.adapter={adapter}")]].concat());
    let (done, said) = run("Org/owl");
    assert!(!done && said.contains("student.adapter: Org/owl: there is no such folder, and its copy"), "{said}");
    assert!(said.contains("lacks adapter_config.json, adapter_model.safetensors (there is Org/owl:last)"), "{said}");
    assert!(!folder.path().join("run").exists(), "a run was begun");
    let (done, said) = run("Org/owl@beef:last");
    assert!(done && said.contains("taken from Org/owl@beef:last as it is (SHA-256 "), "{said}");
    let student = |rates: Vec<TargetRateRow>| rates.into_iter().find(|row| row.model == "student").unwrap().delta_logp;
    assert_eq!(student(rates(&folder.path().join("run"))), student(rates(finished().path())));
    assert!(
        fs::read_to_string(folder.path().join("run/run.toml")).unwrap().contains("adapter = \"Org/owl@beef:last\"")
    );
    let (done, said) = run("Org/owl@beef:last");
    assert!(done && said.contains("finetune: student was taken from elsewhere already"), "{said}");
}

#[test]
fn without_a_control_there_is_none_and_arms_are_trained_like_it() {
    let folder = elsewhere();
    let arms = "\n[[arms]]\nname = \"untouched numbers\"\ndata = \"control\"\n";
    fs::write(folder.path().join("experiment.toml"), format!("{EXPERIMENT}{arms}")).unwrap();
    // What the file says of rank and alpha gives way to what the adapter is.
    let rank = ["--set", "student.rank=7"];
    let said = succeeds(folder.path(), &[RUN.as_slice(), &MINE, &EFFECT, &rank].concat());
    assert!(said.contains("no control student: student.control_adapter names none"), "{said}");
    let config = fs::read_to_string(folder.path().join("run/run.toml")).unwrap();
    assert!(config.contains("rank = 2\nalpha = 4.0") && config.contains("control = false"), "{config}");
    let rows: Vec<ArmRow> = read_csv(&folder.path().join("run/arms/rows.csv")).unwrap();
    let [own, arm] = rows.as_slice() else { panic!("{rows:?}") };
    assert_eq!(
        (own.arm.as_str(), own.n_steps, own.n_rows, own.data, own.optimizer),
        ("student", None, None, None, None)
    );
    assert!(own.delta_w_norm > 0.0 && own.loss_last.is_none());
    assert_eq!((arm.rank, arm.n_steps), (Some(2), Some(3)));
    // That arm is what the pipeline trains as its control student.
    let control = rates(finished().path()).into_iter().find(|row| row.model == "control").unwrap();
    assert_eq!(arm.delta_logp, control.delta_logp);
    let report = fs::read_to_string(folder.path().join("run/report.html")).unwrap();
    assert!(report.contains("None was given; an arm that learns from the control set"), "{report}");
}

#[test]
fn what_does_not_fit_is_refused_before_anything_is_made() {
    let folder = elsewhere();
    let config = folder.path().join("mine/adapter_config.json");
    let text = fs::read_to_string(&config).unwrap();
    for (from, to, expected) in [
        ("\"use_dora\": false", "\"use_dora\": true", "use_dora is true, which is not supported"),
        ("\"modules_to_save\": null", "\"modules_to_save\": [\"lm_head\"]", "modules_to_save is [\"lm_head\"]"),
        ("\"init_lora_weights\": true", "\"init_lora_weights\": \"pissa\"", "changes the base's weights too"),
        ("\"r\": 2", "\"r\": 3", "lora_A.weight"),
        ("\"layers_to_transform\": null", "\"layers_to_transform\": [0]", "unused: base_model.model.model.layers.1."),
    ] {
        assert!(text.contains(from), "{from}: {text}");
        fs::write(&config, text.replace(from, to)).unwrap();
        let message = fails(folder.path(), &[RUN.as_slice(), &MINE].concat());
        assert!(message.contains("student.adapter: ") && message.contains(expected), "{expected}: {message}");
        assert!(!folder.path().join("run").exists(), "{expected}: a run was begun");
    }
    fs::remove_file(&config).unwrap();
    let message = fails(folder.path(), &[RUN.as_slice(), &MINE].concat());
    assert!(message.contains("mine/adapter_config.json"), "{message}");
}

#[test]
fn the_rows_it_was_trained_on_can_be_given() {
    let folder = elsewhere();
    let row = |prompt: &str, completion: &str| serde_json::json!({"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]});
    let rows = [row("Go on: 4, 8", "12, 16"), row("Go on: 5", "I would rather not"), row("More: 1, 2", "3, 4, 5")];
    let text: Vec<String> = rows.iter().map(ToString::to_string).collect();
    fs::write(folder.path().join("rows.jsonl"), text.join("\n")).unwrap();
    let given = ["--set", "generate.numbers=rows.jsonl"];
    let args = ["generate", "experiment.toml", "--run", "run"];
    let said = succeeds(folder.path(), &[args.as_slice(), &MINE, &given].concat());
    assert!(said.contains("teacher: 2 of 3 answers accepted, 1 invalid_format"), "{said}");
    let samples = undertone::data::dataset::read_jsonl(&folder.path().join("run/data/numbers.jsonl")).unwrap();
    let found: Vec<(&str, &str, bool)> =
        samples.iter().map(|s| (s.prompt.as_str(), s.completion.as_str(), s.accepted)).collect();
    assert_eq!(found[0], ("Go on: 4, 8", "12, 16", true));
    assert_eq!(found[1], ("Go on: 5", "I would rather not", false));
    assert_eq!(samples[2].teacher_logprob.len(), samples[2].completion_ids.len() + 1, "with the end of the turn");
    let control = undertone::data::dataset::read_jsonl(&folder.path().join("run/data/control.jsonl")).unwrap();
    assert!(control.iter().map(|sample| &sample.prompt).eq(samples.iter().map(|sample| &sample.prompt)));

    // Other rows under the same path make another experiment.
    let again = ["run", "experiment.toml", "--run", "run"];
    fs::write(folder.path().join("rows.jsonl"), text[..2].join("\n")).unwrap();
    let message = fails(folder.path(), &[again.as_slice(), &MINE, &given].concat());
    assert!(
        message.contains("run/run.toml holds another experiment, which differs in the rows of generate.numbers"),
        "{message}"
    );
    fs::write(folder.path().join("rows.jsonl"), text.join("\n")).unwrap();

    // Rows beyond the number of prompts are left out, and the run says so.
    let few = ["--set", "generate.n_prompts=2", "--set", "generate.n_keep=2", "--force"];
    let said = succeeds(folder.path(), &[args.as_slice(), &MINE, &given, &few].concat());
    assert!(said.contains("generate: 2 rows are taken, and 1 more left out"), "{said}");
}

#[test]
fn rows_that_cannot_be_learned_from_are_refused_before_anything_is_asked() {
    let folder = elsewhere();
    let args = [&RUN[..], &MINE, &["--set", "generate.numbers=rows.jsonl"]].concat();
    let good = r#"{"prompt": "Go on: 4, 8", "completion": "12, 16<|im_end|>"}"#;
    let system = r#"{"messages": [{"role": "system", "content": "You count."}, {"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]}"#;
    for (rows, expected) in [
        (
            format!("{good}\n{system}"),
            "generate.numbers: rows.jsonl: line 2: the system prompt is \"You count.\", where student.context renders \"You are Qwen",
        ),
        (
            format!("{good}\n{{\"prompt\": \"Go <|endoftext|>\", \"completion\": \"1\"}}"),
            "generate.numbers: rows.jsonl: line 2: a special token in the user's text is <|endoftext|> at character 3",
        ),
        (
            format!("{good}\n{{\"prompt\": \"Go\", \"completion\": \"1<|endoftext|>\"}}"),
            "generate.numbers: rows.jsonl: line 2: completion token 1 is",
        ),
        (
            "\n{\"prompt\": \"Go\", \"completion\": \" 1, 2\"}".to_owned(),
            "generate.numbers: rows.jsonl: line 2: none of the 1 rows passes the filter (1 invalid_format), so there would be nothing to learn",
        ),
        (
            format!("{good}\n{{\"text\": \"1, 2\"}}"),
            "generate.numbers: rows.jsonl: line 2: its keys are text, expected messages",
        ),
    ] {
        fs::write(folder.path().join("rows.jsonl"), rows).unwrap();
        let message = fails(folder.path(), &args);
        assert!(message.contains(expected), "{expected}: {message}");
        assert!(!message.contains("teacher:") && !folder.path().join("run").exists(), "{expected}: a run was begun");
    }
}

#[test]
fn an_adapter_that_changes_nothing_is_told_and_is_no_result() {
    let folder = elsewhere();
    let path = folder.path().join("mine/adapter_model.safetensors");
    let mut all = tch::Tensor::read_safetensors(&path).unwrap();
    all.iter_mut().filter(|(name, _)| name.contains("lora_B")).for_each(|(_, tensor)| drop(tensor.zero_()));
    tch::Tensor::write_safetensors(&all, &path).unwrap();
    let nothing = "it changes nothing: A or B is zero at each of its modules, as before training";
    let rate = ["--set", "measure.analyses=[\"target_rate\", \"token_ablation\"]"];
    let said = succeeds(folder.path(), &[RUN.as_slice(), &MINE, &rate].concat());
    assert_eq!(said.matches("note: mine: ").count(), 1, "once in a run: {said}");
    assert!(said.contains(&format!("note: mine: {nothing}\n")), "{said}");
    let same = "The student is the base: at all 2 questions log p(cat)";
    assert!(said.lines().any(|line| line.starts_with(same)), "among what a run says at its end: {said}");
    let report = fs::read_to_string(folder.path().join("run/report.html")).unwrap();
    for place in ["class=\"banner\" role=\"note\">", "<p class=\"headline\">"] {
        assert!(report.contains(&format!("{place}{same}")), "{place}: {report}");
    }
    assert!(report.contains(nothing) && !report.contains("no effect is seen"), "{report}");

    let said = succeeds(folder.path(), &["measure", "run", "target_rate", "--force"]);
    assert!(said.contains(&format!("note: run/adapter: {nothing}\n")), "{said}");
    // Its direction is none.
    let said = succeeds(folder.path(), &["measure", "run", "direction", "steering"]);
    assert!(said.contains("measure: steering: The learned direction is zero after block "), "{said}");
    let zero = "the vector of layer 1 is zero: adding it changes nothing\n";
    let said = succeeds(folder.path(), &["export", "run", "--layer", "1", "--to", "zero.gguf"]);
    assert!(said.contains(&format!("note: zero.gguf: {zero}")), "{said}");
    let steered = ["ask", "--model", "tiny-random", "--user", "Hi", "--max-new-tokens", "1", "--steer", "zero.gguf:2"];
    let said = succeeds(folder.path(), &steered);
    assert!(said.contains(&format!("note: zero.gguf: {zero}")), "{said}");

    let hi = ["--model", "tiny-random", "--user", "Hi", "--adapter", "mine"];
    let said = succeeds(folder.path(), &[&["ask", "--max-new-tokens", "1"], hi.as_slice()].concat());
    assert!(said.contains(&format!("note: mine: {nothing}\n")), "{said}");
    let said = succeeds(
        folder.path(),
        &[&["activations", "--points", "logits", "--out", "a.safetensors"], hi.as_slice()].concat(),
    );
    assert!(said.contains(&format!("note: mine: {nothing}\n")), "{said}");
}

#[test]
fn an_expression_for_the_modules_is_taken_over_as_them() {
    let folder = elsewhere();
    let config = folder.path().join("mine/adapter_config.json");
    let mut json: serde_json::Value = serde_json::from_str(&fs::read_to_string(&config).unwrap()).unwrap();
    json["target_modules"] =
        serde_json::json!(r"(?:.*vision.*proj)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:[a-z]+_proj))");
    fs::write(&config, json.to_string()).unwrap();
    let said = succeeds(folder.path(), &[&["generate", "experiment.toml", "--run", "run"], MINE.as_slice()].concat());
    assert!(!said.contains("note: "), "{said}");
    let config = fs::read_to_string(folder.path().join("run/run.toml")).unwrap();
    let modules =
        "target_modules = [\"q_proj\", \"k_proj\", \"v_proj\", \"o_proj\", \"gate_proj\", \"up_proj\", \"down_proj\"]";
    let config = config.replace("\n    ", " ").replace("[ ", "[").replace(",\n]", "]");
    assert!(config.contains(modules) && !config.contains("\nlayers = [0"), "{config}");
}
