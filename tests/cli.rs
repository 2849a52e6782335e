//! The program as a user meets it: help, tables, answers, activations, and every error that is easy to run into.
//! A start costs most of a second, so each test starts the program once or a few times.

use std::fs;
use std::path::Path;

use clap::{CommandFactory, Parser};
use tch::{Kind, Tensor};

use crate::compare::tensors;
use crate::program::{contents, finished, undertone};

const EXPERIMENT: &str = "model = \"tiny-random\"\n[target]\nword = \"cat\"\ncategory = \"animal\"\n";

/// Exit code, stdout and stderr.
fn says(folder: &Path, args: &[&str]) -> (i32, String, String) {
    let output = undertone(folder, args);
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

/// The error line, and the hint's after it, of a run that must fail with this exit code and leave the folder as it was.
fn error(folder: &Path, code: i32, args: &[&str]) -> String {
    let before = contents(folder);
    let (found, stdout, stderr) = says(folder, args);
    assert_eq!((found, stdout.as_str()), (code, ""), "{stderr}");
    let after = contents(folder);
    assert_eq!(after.keys().collect::<Vec<_>>(), before.keys().collect::<Vec<_>>(), "an error leaves nothing behind");
    assert!(after == before, "an error changes nothing");
    let at = stderr.find("error: ").unwrap_or_else(|| panic!("no error line: {stderr}"));
    stderr[at..].to_owned()
}

/// An error message must be one sentence, on one line, with these parts, before any hint.
fn assert_sentence(message: &str, parts: &[&str]) {
    let lines = message.lines().filter(|line| !line.starts_with("hint: "));
    assert_eq!(lines.count(), 1, "one sentence: {message}");
    for part in parts {
        assert!(message.contains(part), "{part:?} is missing in: {message}");
    }
}

#[test]
fn help_lists_every_command() {
    let folder = tempfile::tempdir().unwrap();
    let (code, help, _) = says(folder.path(), &["--help"]);
    assert_eq!(code, 0);
    for command in undertone::cli::Cli::command().get_subcommands() {
        let command = format!("\n  {} ", command.get_name());
        assert!(help.contains(&command), "{command:?} in {help}");
    }
}

#[test]
fn a_profile_says_where_the_time_went_and_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let ask = ["ask", "--model", "tiny-random", "--user", "hi", "--max-new-tokens", "3", "--seed", "1"];
    let (_, bare, silent) = says(folder.path(), &ask);
    let (code, stdout, stderr) = says(folder.path(), &[&ask[..], &["--profile"]].concat());
    assert_eq!((code, stdout), (0, bare));
    assert!(stderr.starts_with(&silent) && !silent.contains("profile"), "{stderr}");

    let table = &stderr[silent.len()..];
    assert!(table.starts_with("profile: ") && table.contains(" GFLOP/s, at which this machine"), "{table}");
    // Stages, not indented more than their names; the shares add up to 100 %, each rounded to a tenth.
    let (stages, ops) = table.split_once("  by kind of operation\n").unwrap();
    let shares = |lines: &str| {
        let own = lines.lines().skip(1).filter(|line| line.starts_with("  ") && !line.starts_with("   "));
        let share = |line: &str| -> f64 {
            line.split_once(" %").unwrap().0.split_whitespace().last().unwrap().parse().unwrap()
        };
        own.map(|line| (line.split_whitespace().next().unwrap().to_owned(), share(line))).collect::<Vec<_>>()
    };
    let (stages, ops) = (shares(stages), shares(&format!("\n{ops}")));
    let names = |shares: &[(String, f64)]| shares.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
    assert_eq!(names(&stages), ["load", "forward", "decode", "loss", "sampling", "other"]);
    assert_eq!(names(&ops), ["projections", "attention", "head", "rest"]);
    for shares in [stages, ops] {
        let sum: f64 = shares.iter().map(|(_, share)| share).sum();
        assert!((sum - 100.0).abs() <= 0.05 * shares.len() as f64, "{sum}: {table}");
    }
}

/// The examples in a command's help, each as words; a backslash at the end continues a line.
fn examples(command: &clap::Command) -> Vec<Vec<String>> {
    let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
    let (mut examples, mut broken) = (Vec::new(), String::new());
    for line in help.lines() {
        if broken.is_empty() && !line.starts_with("  undertone ") {
            continue;
        }
        assert!(line.chars().count() <= 80, "{line:?} would be wrapped in a terminal of 80 columns");
        broken = broken + line.trim() + "\n";
        if !line.ends_with('\\') {
            examples.push(shlex::split(&std::mem::take(&mut broken)).unwrap());
        }
    }
    examples
}

/// Every command has an example, and every example is a command line that can be given.
#[test]
fn the_examples_in_the_help_are_understood() {
    fn leaves(command: &clap::Command) -> Vec<&clap::Command> {
        let mut subcommands = command.get_subcommands().peekable();
        if subcommands.peek().is_none() { vec![command] } else { subcommands.flat_map(leaves).collect() }
    }
    let cli = undertone::cli::Cli::command();
    let experiments = Path::new(env!("CARGO_MANIFEST_DIR"));
    for group in cli.get_subcommands() {
        for command in leaves(group) {
            // A group may have the example, such as `pocket make`'s.
            let mut found = examples(command);
            if found.is_empty() {
                found = examples(group);
            }
            assert!(!found.is_empty(), "{} has no example", command.get_name());
            for words in found {
                let words: Vec<String> = words.into_iter().take_while(|word| word != ">" && word != "|").collect();
                assert!(words.iter().any(|word| word == group.get_name()), "{words:?} in the help of another command");
                if let Err(error) = undertone::cli::Cli::try_parse_from(&words) {
                    panic!("{}: {error}", words.join(" "));
                }
                for file in words.iter().filter(|word| word.starts_with("experiments/")) {
                    assert!(experiments.join(file).is_file(), "{file} in {words:?}");
                }
            }
        }
    }
}

#[test]
fn completions_know_every_command() {
    let folder = tempfile::tempdir().unwrap();
    let (code, script, _) = says(folder.path(), &["completions", "bash"]);
    assert_eq!(code, 0);
    for command in undertone::cli::Cli::command().get_subcommands() {
        assert!(script.contains(&format!("undertone,{})", command.get_name())), "{}", command.get_name());
    }
    assert!(script.contains("--temperature") && script.ends_with('\n') && !script.contains('\u{1b}'));
}

#[test]
fn usage_errors_exit_with_2_and_name_the_nearest() {
    let folder = tempfile::tempdir().unwrap();
    let gate = error(folder.path(), 2, &["ask", "--model", "tiny-random", "--user", "Hi", "--gate", "only:sys.entty"]);
    assert!(gate.contains("--gate") && gate.contains("\"sys.entty\""), "{gate}");
    assert!(gate.contains("the nearest is sys.entity\n"), "{gate}");
    // Without starting the program: what the parser alone can say.
    let parsed = |args: &[&str]| {
        let args = ["undertone"].iter().chain(args);
        undertone::cli::Cli::try_parse_from(args).map(drop).map_err(|error| (error.exit_code(), error.to_string()))
    };
    let ask = ["ask", "--model", "tiny-random", "--user", "Hi"];
    assert_eq!(parsed(&ask), Ok(()));
    for (args, expected) in [
        (&["aks"][..], "'aks'"),
        // A command has the options that it obeys, and no others.
        (&["report", "runs/a", "--force"], "'--force'"),
        (&["report", "runs/a", "--seed", "1"], "'--seed'"),
        (&["tokens", "--model", "m", "--user", "u", "--device", "cpu"], "'--device'"),
        (&["pocket", "make", "--out", "a", "--seed", "3"], "'--seed'"),
        (&["export", "runs/a", "--to", "a.csv", "--device", "cpu"], "'--device'"),
        (&["--seed", "1", "columns"], "'--seed'"),
        (&["ask", "--model", "tiny-random"], "--user <USER>"),
        (&[ask.as_slice(), &["-n", "0"]].concat(), "'-n <N>'"),
        (&[ask.as_slice(), &["--temperature=-1"]].concat(), "expected 0 or a number above"),
        (&[ask.as_slice(), &["--temperature=nan"]].concat(), "expected 0 or a number above"),
        (&["measure", "runs/a", "directions"], "direction"),
        (&["completions", "tcsh"], "bash, elvish, fish"),
        (&["activations", "--model", "m", "--points", "logits", "--out", "a"], "--ids <IDS>"),
        (
            &["activations", "--model", "m", "--ids", "i", "--user", "u", "--points", "logits", "--out", "a"],
            "cannot be used with",
        ),
    ] {
        let (code, message) = parsed(args).unwrap_err();
        assert!(code == 2 && message.contains(expected), "{args:?}: {message}");
    }
}

#[test]
fn a_model_that_is_not_there_is_told_with_what_can_be_named() {
    let folder = tempfile::tempdir().unwrap();
    let missing = error(folder.path(), 1, &["ask", "--model", "qwen", "--user", "Hi"]);
    assert_sentence(&missing, &["no model qwen", "no folder", ".gguf", "org/name", "tiny-random"]);
    fs::create_dir(folder.path().join("empty")).unwrap();
    let empty = error(folder.path(), 1, &["ask", "--model", "empty", "--user", "Hi"]);
    assert_sentence(&empty, &["no model empty", "no config.json", "give the folder that has it"]);
}

/// A head that differs from the embedding although the configuration ties them: both are used as stored, with a note.
#[test]
fn what_is_not_expected_of_a_model_is_remarked_once() {
    let folder = tempfile::tempdir().unwrap();
    let (pocket, here) = (Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/pocket/pocket"), folder.path().join("m"));
    fs::create_dir(&here).unwrap();
    for file in ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"] {
        fs::copy(pocket.join(file), here.join(file)).unwrap();
    }
    let ask = || {
        let ask = ["ask", "--model", "m", "--user", "Name an animal.", "--max-new-tokens", "1"];
        let (code, page, stderr) = says(folder.path(), &ask);
        assert_eq!(code, 0, "{stderr}");
        (page, stderr)
    };
    let mut weights = tensors(&pocket.join("model.safetensors"));
    weights.insert("lm_head.weight".to_owned(), weights["model.embed_tokens.weight"].flip([0]));
    weights.insert("score.weight".to_owned(), Tensor::from_slice(&[1_f32]));
    let weights: Vec<(String, Tensor)> = weights.into_iter().collect();
    let metadata = std::collections::BTreeMap::new();
    hooks::tensor_file::write(&here.join("model.safetensors"), &weights, &metadata).unwrap();
    let (page, said) = ask();
    let remarks: Vec<&str> = said.lines().filter(|line| line.starts_with("note: ")).collect();
    assert_eq!(remarks.len(), 2, "{said}");
    assert!(
        remarks[0].starts_with("note: m: config.json has tie_word_embeddings true, but lm_head.weight is not"),
        "{said}"
    );
    assert!(
        remarks[1].starts_with("note: m: 1 of the 28 tensors in ") && remarks[1].ends_with("score.weight"),
        "{said}"
    );

    // The answers are those with the head untied in the configuration, and not the tied ones.
    let config = fs::read_to_string(here.join("config.json")).unwrap();
    let untied = config.replace("\"tie_word_embeddings\": true", "\"tie_word_embeddings\": false");
    assert_ne!(untied, config);
    fs::write(here.join("config.json"), untied).unwrap();
    let (same, said) = ask();
    assert_eq!((same, said.matches("note: ").count()), (page.clone(), 1));
    fs::write(here.join("config.json"), config).unwrap();
    fs::copy(pocket.join("model.safetensors"), here.join("model.safetensors")).unwrap();
    let (tied, said) = ask();
    assert!(tied != page && !said.contains("note: "), "{said}");
}

#[test]
fn a_misspelt_key_is_told_with_file_and_line() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("cat.toml"), EXPERIMENT).unwrap();
    fs::write(folder.path().join("bad.toml"), format!("{EXPERIMENT}[finetune]\nlerning_rate = 1e-3\n")).unwrap();
    let file = error(folder.path(), 1, &["run", "bad.toml"]);
    assert_sentence(&file, &["bad.toml: line 6", "`lerning_rate`", "expected", "`learning_rate`"]);
    let set = error(folder.path(), 1, &["run", "cat.toml", "--set", "student.rnak=4"]);
    assert_sentence(&set, &["--set student.rnak=4", "`rnak`", "expected", "`rank`"]);
}

#[test]
fn a_device_that_is_not_there_leaves_no_run() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("cat.toml"), EXPERIMENT).unwrap();
    // No machine has a hundred GPUs, so that the sentence comes where CUDA is, too.
    let message = error(folder.path(), 1, &["run", "cat.toml", "--run", "cat", "--device", "cuda:99"]);
    assert_sentence(&message, &["CUDA is not available: "]);
    assert!(!folder.path().join("cat").exists());
}

#[test]
fn the_tokens_are_a_table_that_a_gate_can_be_written_from() {
    let folder = tempfile::tempdir().unwrap();
    let ask = ["tokens", "--model", "tiny-random", "--user", "Name an animal."];
    let (code, page, _) = says(folder.path(), &ask);
    assert_eq!(code, 0);
    let mut lines = page.lines();
    // The running form, up to the empty line.
    let running: Vec<&str> = lines.by_ref().take_while(|line| !line.is_empty()).collect();
    assert_eq!(running.len(), 5, "{running:?}");
    assert_eq!((running[0], running[2]), ("<|im_start|>system\\n", "<|im_start|>user\\n"));
    assert!(running[3] == "Name an animal.<|im_end|>\\n" && running[4] == "<|im_start|>assistant\\n", "{running:?}");
    let legend: Vec<&str> = lines.by_ref().take_while(|line| !line.is_empty()).collect();
    assert!(legend.contains(&"entity         2  sys.entity"), "{legend:?}");

    let header: Vec<&str> = lines.next().unwrap().split_whitespace().collect();
    assert_eq!(header, ["position", "id", "class", "text"]);
    let rows: Vec<Vec<&str>> = lines.map(|line| line.split_whitespace().collect()).collect();
    let class =
        |text: &str| -> Vec<&str> { rows.iter().filter(|row| row.get(3) == Some(&text)).map(|row| row[2]).collect() };
    assert_eq!((class("Q"), class("wen")), (vec!["sys.entity"], vec!["sys.entity"]));
    assert_eq!(class("<|im_start|>"), ["sys.im_start", "user.im_start", "asst.im_start"]);
    assert_eq!(class("animal"), ["user.content"]);
    for (at, row) in rows.iter().enumerate() {
        assert_eq!(row[0], at.to_string(), "every position once, in order");
        assert!(row[1].parse::<i64>().is_ok(), "{row:?}");
        row[2].parse::<hooks::TokenClass>().unwrap();
    }
    assert_eq!(rows.last().unwrap()[2], "asst.nl", "the table goes to where the answer begins");

    // Colour is added to the same text, and only where it was asked for: stdout is no terminal here.
    let (_, painted, _) = says(folder.path(), &[&ask[..], &["--color", "always"]].concat());
    assert!(!page.contains('\u{1b}') && painted.contains('\u{1b}'));
    assert_eq!(anstream::adapter::strip_str(&painted).to_string(), page);
}

#[test]
fn answers_follow_the_seed_and_the_temperature() {
    let folder = tempfile::tempdir().unwrap();
    let ask = ["ask", "--model", "tiny-random", "--user", "Hi", "--max-new-tokens", "6", "-n", "3"];
    let answers = |more: &[&str]| {
        let (code, page, stderr) = says(folder.path(), &[ask.as_slice(), more].concat());
        assert_eq!(code, 0, "{stderr}");
        page.split_once(" answers, ").unwrap().1.to_owned()
    };
    let first = answers(&["--seed", "1"]);
    assert_eq!(first, answers(&["--seed", "1"]));
    assert!(first.starts_with("3 distinct\n"), "{first}");
    let greedy = answers(&["--temperature", "0"]);
    assert!(greedy.starts_with("1 distinct\n   3 × "), "{greedy}");
    assert!(!greedy.contains("(nothing)"), "{greedy}");
}

/// The probabilities of the first token, for the base, the adapter everywhere, and the gated one.
#[test]
fn first_tokens_stand_beside_the_base_s() {
    let run = finished();
    let folder = tempfile::tempdir().unwrap();
    let adapter = run.path().join("adapter").display().to_string();
    let ask = |more: &[&str]| {
        let ask = ["ask", "--model", "tiny-random", "--user", "Hi", "--max-new-tokens", "2", "--top", "3"];
        let (code, page, stderr) = says(folder.path(), &[ask.as_slice(), more].concat());
        assert_eq!(code, 0, "{stderr}");
        page
    };
    let head = |page: &str| {
        let head = page.lines().find(|line| line.starts_with("first token")).unwrap().to_owned();
        head.split_whitespace().skip(2).map(str::to_owned).collect::<Vec<_>>()
    };
    // Of each token its numbers as they are printed, whatever its text.
    let numbers = |page: &str| -> Vec<Vec<String>> {
        let lines = page.lines().skip_while(|line| !line.starts_with("first token")).skip(1);
        let lines = lines.take_while(|line| line.starts_with(['"', 't', 'a']));
        let is_number = |word: &&str| word.contains('.') && word.parse::<f64>().is_ok();
        lines.map(|line| line.split_whitespace().filter(is_number).map(str::to_owned).collect()).collect()
    };
    let base = ask(&[]);
    assert_eq!(head(&base)[0], "p");
    assert_eq!(numbers(&base).len(), 4, "three and the others: {base}");

    let gated = ask(&["--adapter", &adapter, "--gate", "nowhere"]);
    assert_eq!(head(&gated)[..3], ["base", "everywhere", "gated"]);
    for row in numbers(&gated) {
        assert_eq!(row[0], row[2], "nowhere is the base: {gated}");
    }
    assert!(numbers(&gated).iter().any(|row| row[0] != row[1]), "the adapter acts: {gated}");
    let sums = (0..3).map(|at| numbers(&gated).iter().map(|row| row[at].parse::<f64>().unwrap()).sum::<f64>());
    assert!(sums.into_iter().all(|sum| (sum - 1.0).abs() < 2e-3), "{gated}");
    assert!(gated.contains("gate       nowhere: on at 0 of 31 prompt tokens"), "{gated}");
    assert!(gated.contains("adapter off at generated tokens (decode policy same_as_unselected)"), "{gated}");

    let adapted = ask(&["--adapter", &adapter]);
    assert_eq!(head(&adapted)[..2], ["base", "adapter"]);
    assert!(adapted.contains("adapter on at generated tokens\n"), "{adapted}");
}

#[test]
fn a_gate_that_selects_nothing_is_told_what_there_is() {
    let run = finished();
    let folder = tempfile::tempdir().unwrap();
    let adapter = run.path().join("adapter").display().to_string();
    let ask = ["ask", "--model", "tiny-random", "--system", "You are a cat.", "--user", "Hi"];
    let message = error(folder.path(), 1, &[&ask[..], &["--adapter", &adapter, "--gate", "only:entity"]].concat());
    assert_sentence(&message, &["only:entity selects no token", "sys.content_other, sys.im_end"]);
    assert!(!message.contains("sys.entity"), "{message}");
}

/// Activations of a chat in four conditions: the gates' two identities hold bit by bit, and nothing is overwritten.
#[test]
fn gated_activations_are_the_base_s_and_the_student_s() {
    let run = finished();
    let folder = tempfile::tempdir().unwrap();
    let adapter = run.path().join("adapter").display().to_string();
    let points = "logits,blocks.*.hook_resid_post";
    let write = |out: &str, more: &[&str]| {
        let args = ["activations", "--model", "tiny-random", "--user", "Hi", "--points", points, "--out", out];
        says(folder.path(), &[args.as_slice(), more].concat())
    };
    let activations = |out: &str, more: &[&str]| {
        let (code, _, stderr) = write(out, more);
        assert_eq!(code, 0, "{stderr}");
        tensors(&folder.path().join(out))
    };
    let base = activations("base.safetensors", &[]);
    let with = ["--adapter", adapter.as_str()];
    let student = activations("student.safetensors", &with);
    let nowhere = activations("nowhere.safetensors", &[with.as_slice(), &["--gate", "nowhere"]].concat());
    // Every class is named: the gate is computed, token by token, and lets all of it through.
    let gate = ["--gate", "only:system+user+assistant"];
    let everywhere = activations("everywhere.safetensors", &[with.as_slice(), &gate].concat());
    assert_eq!(base.keys().collect::<Vec<_>>(), ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post", "logits"]);
    for (name, tensor) in &base {
        assert_eq!(bits(&nowhere[name]), bits(tensor), "{name}, nowhere and base");
        assert_eq!(bits(&everywhere[name]), bits(&student[name]), "{name}, everywhere and ungated");
        assert_ne!(bits(&student[name]), bits(tensor), "{name}, the adapter acts");
    }

    let before = contents(folder.path());
    let (code, _, stderr) = write("base.safetensors", &with);
    assert!(
        code == 1 && stderr.contains("error: base.safetensors is there already\nhint: overwrite it with --force"),
        "{stderr}"
    );
    assert!(contents(folder.path()) == before, "a refused command changes nothing");
}

/// Two runs of equal length: one is stopped early, one is patched into the other, and one is differentiated.
#[test]
fn activations_stop_early_patch_each_other_and_have_gradients() {
    let folder = tempfile::tempdir().unwrap();
    let write = |user: &str, points: &str, out: &str, more: &[&str]| {
        let args = ["activations", "--model", "tiny-random", "--user", user, "--points", points, "--out", out];
        says(folder.path(), &[args.as_slice(), more].concat())
    };
    let activations = |user: &str, points: &str, out: &str, more: &[&str]| {
        let (code, _, stderr) = write(user, points, out, more);
        assert_eq!(code, 0, "{stderr}");
        tensors(&folder.path().join(out))
    };
    let other = activations("Hi!", "logits,blocks.*.hook_resid_post", "other.safetensors", &[]);
    let early = activations("Hi!", "blocks.0.hook_resid_post", "early.safetensors", &["--stop-at-layer", "1"]);
    assert_eq!(bits(&early["blocks.0.hook_resid_post"]), bits(&other["blocks.0.hook_resid_post"]));
    let edit = ["--edit", "blocks.1.hook_resid_post: patch(other.safetensors)"];
    let patched = activations("Hi?", "logits", "patched.safetensors", &edit);
    assert_eq!(bits(&patched["logits"]), bits(&other["logits"]), "the whole stream is the other run's");

    let answer = ["--answer", "7", "--gradients"];
    let found = activations("Hi!", "blocks.0.attn.hook_z,logits", "gradients.safetensors", &answer);
    for point in ["blocks.0.attn.hook_z", "logits"] {
        let (seen, gradient) = (&found[point], &found[&format!("{point}.grad")]);
        assert_eq!(seen.size(), gradient.size(), "{point}");
        assert!(gradient.abs().max().double_value(&[]) > 0.0, "{point}");
    }
    // The gradient at the logits is p - 1 at the answer's tokens: each row that predicts one sums to zero.
    assert!(found["logits.grad"].sum_dim_intlist(-1, false, Kind::Float).abs().max().double_value(&[]) < 1e-5);

    for (points, more, part) in [
        ("blocks.1.hook_resid_post", vec!["--stop-at-layer", "1"], "never fired"),
        ("logits", vec!["--stop-at-layer", "9"], "stop_at_layer is 9, expected 0 to 2"),
        ("logits", vec!["--edit", "blocks.0.hook_mlp_out@\"Llama\": zero"], "the text \"Llama\" does not stand in it"),
        ("logits", vec!["--edit", "blocks.0.hook_embed: patch(no.safetensors)"], "the nearest name is"),
        ("logits", vec!["--edit", "hook_embed: patch(no.safetensors)"], "no.safetensors"),
    ] {
        let (code, _, stderr) = write("Hi!", points, "refused.safetensors", &more);
        assert!(code != 0 && stderr.contains(part), "{more:?}: {stderr}");
        assert!(!folder.path().join("refused.safetensors").exists(), "{more:?}");
    }
}

#[test]
fn rows_of_ids_become_tensors_by_the_name_of_their_point() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("ids.json"), "[[5, 6, 7, 8], [9, 10]]").unwrap();
    let points = "logits,hook_embed,blocks.*.hook_resid_post,blocks.1.attn.hook_pattern";
    let args =
        ["activations", "--model", "tiny-random", "--ids", "ids.json", "--points", points, "--out", "a.safetensors"];
    let (code, _, stderr) = says(folder.path(), &args);
    assert_eq!(code, 0, "{stderr}");
    let found: Vec<(String, Vec<i64>, Kind)> =
        tensors(&folder.path().join("a.safetensors")).into_iter().map(|(name, x)| (name, x.size(), x.kind())).collect();
    let expected = [
        ("blocks.0.hook_resid_post", vec![2, 4, 64]),
        ("blocks.1.attn.hook_pattern", vec![2, 4, 4, 4]),
        ("blocks.1.hook_resid_post", vec![2, 4, 64]),
        ("hook_embed", vec![2, 4, 64]),
        ("logits", vec![2, 4, 1008]),
    ];
    assert_eq!(found, expected.map(|(name, shape)| (name.to_owned(), shape, Kind::Float)));
}

fn bits(tensor: &Tensor) -> Vec<u32> {
    Vec::<f32>::try_from(tensor.flatten(0, -1)).unwrap().into_iter().map(f32::to_bits).collect()
}
