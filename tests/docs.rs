//! The pages for readers: every TOML block is an experiment, every Rust block compiles, every command can be given, every
//! key and default is there, and every message on the page of errors is what the library says. Nothing here starts the
//! program.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use analyses::divergence::Divergence;
use analyses::plot::{Bar, BarChart, bars};
use analyses::target_rate::TargetRate;
use analyses::token_ablation::TokenAblation;
use analyses::{Analysis, Subject, Tuned};
use clap::Parser;
use hooks::{Adapter, Batch, Cache, Chat, Config, HookPoint, Hooks, LoraConfig, ModelFiles, Pass, Qwen};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use regex::Regex;
use tch::{Device, Kind};
use undertone::cli::{Cli, run};
use undertone::data::protocol::Protocol;
use undertone::experiment::Experiment;

const PAPER: &str = include_str!("../docs/from-a-paper-to-an-experiment.md");
const ERRORS: &str = include_str!("../docs/errors.md");
const ARCHITECTURE: &str = include_str!("../ARCHITECTURE.md");

/// The keys that a fragment lacks.
const MINIMAL: &str = "model = \"pocket\"\n[target]\nword = \"cat\"\ncategory = \"animal\"\n";

/// The pages for readers, by name: the README first.
fn pages() -> Vec<(String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let docs = fs::read_dir(root.join("docs")).unwrap().map(|entry| entry.unwrap().path());
    let mut paths: Vec<PathBuf> = docs.filter(|path| path.extension().is_some_and(|ending| ending == "md")).collect();
    paths.sort();
    let others = [
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "fuzz/README.md",
        "benchmarks/README.md",
        "examples/stranger/README.md",
        "hooks/HOOKS.md",
    ];
    paths.splice(0..0, others.map(|name| root.join(name)));
    let name = |path: &Path| path.strip_prefix(root).unwrap().display().to_string();
    paths.iter().map(|path| (name(path), fs::read_to_string(path).unwrap())).collect()
}

/// The fenced blocks of a page: language and text, in order.
fn blocks(page: &str) -> Vec<(&str, String)> {
    let (mut blocks, mut open): (Vec<(&str, String)>, bool) = (vec![], false);
    for line in page.lines() {
        match (line.strip_prefix("```"), open) {
            (Some(language), false) => blocks.push((language, String::new())),
            (None, true) => blocks.last_mut().unwrap().1.extend([line, "\n"]),
            _ => {}
        }
        open ^= line.starts_with("```");
    }
    assert!(!open, "a block is not closed");
    blocks
}

/// The blocks of a page in one language.
fn blocks_of(page: &str, wanted: &str) -> Vec<String> {
    blocks(page).into_iter().filter(|(language, _)| *language == wanted).map(|(_, text)| text).collect()
}

/// The commands of a page, each as words; a backslash at the end continues a line.
fn commands(block: &str) -> Vec<Vec<String>> {
    let joined = block.replace("\\\n", " ");
    let ours = joined.lines().filter(|line| line.starts_with("undertone "));
    let words = ours.map(|line| shlex::split(line).unwrap_or_else(|| panic!("{line} is not closed")));
    words.map(|words| words.into_iter().take_while(|word| word != ">" && word != "|").collect()).collect()
}

fn parse(text: &str, changes: &[String]) -> Result<Experiment, String> {
    Experiment::parse(text, Path::new("page.toml"), changes).map_err(|error| format!("{error:#}"))
}

/// A fragment as a whole experiment: its first line says `# a fragment`, and what it does not have is added.
fn whole(block: &str) -> String {
    if !block.starts_with("# a fragment\n") {
        return block.to_owned();
    }
    let mut table: toml::Table = toml::from_str(block).unwrap();
    for (key, value) in toml::from_str::<toml::Table>(MINIMAL).unwrap() {
        table.entry(key).or_insert(value);
    }
    toml::to_string(&table).unwrap()
}

#[test]
fn every_toml_block_is_an_experiment() {
    let folder = tempfile::tempdir().unwrap();
    let published = folder.path().join("published.json");
    let sets = blocks_of(PAPER, "json");
    assert_eq!(sets.len(), 1, "the page shows one protocol");
    Protocol::parse(&sets[0]).unwrap();
    fs::write(&published, &sets[0]).unwrap();
    let mut seen = 0;
    for (name, page) in pages() {
        for block in blocks_of(&page, "toml") {
            let text = whole(&block).replace("published.json", &published.display().to_string());
            let experiment = parse(&text, &[]).unwrap_or_else(|error| panic!("{name}: {error}\n{block}"));
            experiment.cells().unwrap();
            seen += 1;
        }
    }
    assert!(seen >= 6, "{seen} blocks: the pages were not read");
}

/// The lines of ARCHITECTURE.md, which own their values.
#[allow(clippy::needless_pass_by_value)]
fn one_idea(model: &Qwen, batch: Batch, lora: Adapter) -> hooks::Result<[tch::Tensor; 4]> {
    let base = model.forward(&batch, &mut Pass::default())?;
    let student = model.forward(&batch, &mut Pass { adapter: Some(&lora), ..Pass::default() })?;

    let mut cache = Cache::default();
    let hooks = Hooks::default().on(HookPoint::select("blocks.*.hook_resid_post", 24)?, &mut cache);
    let logits = model.forward(&batch, &mut Pass { adapter: Some(&lora), hooks, ..Pass::default() })?;
    let resid = cache.get(HookPoint::ResidPost(14))?;
    Ok([base, student, logits, resid.shallow_clone()])
}

/// The README's block is a doctest of `src/lib.rs`, that of ARCHITECTURE.md is `one_idea`; no other page may have one.
#[test]
fn every_rust_block_compiles() {
    let fragment = blocks_of(ARCHITECTURE, "rust");
    assert_eq!((fragment.len(), blocks_of(include_str!("../README.md"), "rust,no_run").len()), (1, 1));
    let bare = |text: &str| -> String {
        let lines = text.lines().map(|line| line.split("//").next().unwrap());
        lines.flat_map(str::split_whitespace).collect()
    };
    assert!(bare(include_str!("docs.rs")).contains(&bare(&fragment[0])), "one_idea has other lines");
    for (name, page) in pages().split_off(1) {
        assert!(blocks(&page).iter().all(|(language, _)| !language.starts_with("rust")), "{name} has a Rust block");
    }

    let tiny = ModelFiles::open("tiny-random").unwrap();
    let config = Config { n_layers: 24, ..tiny.config.clone() };
    let files =
        ModelFiles::fresh("deep", config, tiny.tokenizer.clone().unwrap(), ChaCha8Rng::seed_from_u64(1)).unwrap();
    let model = Qwen::load(&files, Device::Cpu, Kind::Float).unwrap();
    let lora = Adapter::init(&LoraConfig::default(), &model.config, &mut ChaCha8Rng::seed_from_u64(2), Device::Cpu);
    let prompt = Chat::from_files(&files).unwrap().prompt(None, "Hi").unwrap();
    let [base, student, logits, resid] =
        one_idea(&model, Batch::of(&[&prompt], Device::Cpu).unwrap(), lora.unwrap()).unwrap();
    assert!(base == student && student == logits, "a fresh adapter's B is zero, and a cache changes nothing");
    assert_eq!(resid.size()[2], model.config.d_model);
}

#[test]
fn every_command_is_understood() {
    let mut seen = BTreeSet::new();
    for (name, page) in pages() {
        for words in blocks_of(&page, "sh").iter().flat_map(|block| commands(block)) {
            let line = words.join(" ");
            match Cli::try_parse_from(&words) {
                // The page of errors shows refused commands, and has a test of its own.
                Err(error) if name != "docs/errors.md" => panic!("{name}: {line}: {error}"),
                _ => seen.insert(words[1].clone()),
            };
            for file in words.iter().filter(|word| word.starts_with("experiments/")) {
                assert!(Path::new(env!("CARGO_MANIFEST_DIR")).join(file).is_file(), "{name}: {file} in {line}");
            }
        }
    }
    for command in ["run", "arms", "tokens", "ask", "columns", "report"] {
        assert!(seen.contains(command), "no page shows {command}");
    }
}

/// Keys and defaults of the first table: setting a key to its default changes nothing.
#[test]
fn the_defaults_on_the_page_are_the_defaults() {
    let plain = parse(MINIMAL, &[]).unwrap();
    let row = Regex::new(r"(?m)^\|[^|]*\| `([a-z_.0-9]+)` \| (`(.*)`|none|required) \|$").unwrap();
    let mut seen = 0;
    for found in row.captures_iter(PAPER) {
        seen += 1;
        let (key, Some(default)) = (&found[1], found.get(3)) else { continue };
        let experiment = parse(MINIMAL, &[format!("{key}={}", default.as_str())]);
        assert_eq!(experiment.unwrap(), plain, "{key}: {}", default.as_str());
    }
    let rows = PAPER.lines().skip_while(|line| !line.starts_with("| in the paper")).skip(2);
    assert_eq!(seen, rows.take_while(|line| line.starts_with('|')).count(), "a row of the table is not read");
    assert_eq!(plain.finetune, undertone::training::settings::Finetune::default());
}

/// Every key that is named in the text, in any page, is a key of an experiment.
#[test]
fn every_key_in_the_text_exists() {
    // A table is of no key's type, so a key that is known is refused for its type, and only an unknown one as unknown.
    let is_known = |key: &str| {
        ["prompt", "adapter", "finetuned", "steered", "planted"].iter().any(|kind| {
            let changes = [format!("teacher.kind={kind}"), format!("{key}={{}}")];
            parse(MINIMAL, &changes).map_or_else(|error| !error.contains("unknown field"), |_| true)
        })
    };
    assert!(is_known("student.rank") && is_known("teacher.share") && !is_known("student.rnak"));
    let key = Regex::new(r"[`\x22 =](?:(?:generate|student|finetune|measure|seeds|teacher|target)(?:\.[a-z_0-9]+)+)")
        .unwrap();
    let mut seen = 0;
    for (name, page) in pages() {
        for found in key.find_iter(&page) {
            let key = &found.as_str()[1..];
            let is_file = ["csv", "rs", "svg", "toml"].iter().any(|ending| key.ends_with(&format!(".{ending}")));
            assert!(is_file || is_known(key), "{name}: {key}");
            seen += usize::from(!is_file);
        }
    }
    assert!(seen > 60, "{seen} keys");
}

/// `.ci/run` and the workflow have the same commands, in the same order.
#[test]
fn the_workflow_runs_what_ci_runs() {
    let commands = |text: &str, prefix: &str| -> Vec<String> {
        let lines = text.lines().filter_map(|line| line.trim().strip_prefix(prefix));
        lines.filter(|line| line.starts_with("make ") || line.starts_with("python3 ")).map(str::to_owned).collect()
    };
    let workflow = include_str!("../.github/workflows/ci.yml").split("\n  msrv:").next().unwrap();
    let script = commands(include_str!("../.ci/run"), "");
    assert!(script.len() > 8 && script == commands(workflow, "run: "), "{script:?}");
}

#[test]
fn every_link_to_a_file_leads_somewhere() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let link = Regex::new(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)").unwrap();
    let mut seen = 0;
    for (name, page) in pages() {
        for found in link.captures_iter(&page) {
            let file = root.join(&name).parent().unwrap().join(&found[1]);
            assert!(file.exists(), "{name}: there is no {}", &found[1]);
            seen += 1;
        }
    }
    assert!(seen >= 4, "{seen} links");
}

/// The names of an error's variants, from its source.
fn variants(source: &str) -> Vec<&str> {
    let body = source.split_once("pub enum Error {\n").unwrap().1.split_once("\n}\n").unwrap().0;
    body.lines()
        .filter_map(|line| line.strip_prefix("    "))
        .filter(|line| line.starts_with(|letter: char| letter.is_ascii_uppercase()))
        .map(|line| line.split([' ', '(', ',']).next().unwrap())
        .collect()
}

#[test]
fn every_class_of_error_has_its_section() {
    let sources =
        [("hooks", include_str!("../hooks/src/error.rs")), ("analyses", include_str!("../analyses/src/error.rs"))];
    for (library, source) in sources {
        let variants = variants(source);
        assert!(variants.len() > 7, "{library}: {variants:?}");
        for variant in variants {
            let name = format!("`{library}::Error::{variant}`");
            assert!(ERRORS.contains(&name), "docs/errors.md has no section for {name}");
        }
    }
    let slug =
        |title: &str| title.to_lowercase().replace(|c: char| !c.is_alphanumeric() && c != ' ', "").replace(' ', "-");
    let sections: BTreeSet<String> = ERRORS.lines().filter_map(|line| line.strip_prefix("## ")).map(slug).collect();
    let links = Regex::new(r"\(#([a-z-]+)\)").unwrap();
    let linked: BTreeSet<String> = links.captures_iter(ERRORS).map(|found| found[1].to_owned()).collect();
    assert_eq!(linked, sections, "the table at the top links every section");
}

/// Whether a text is the page's, whose `…` matches anything.
fn matches(found: &str, page: &str) -> bool {
    let parts: Vec<String> = page.split('…').map(regex::escape).collect();
    Regex::new(&format!("(?s)^{}$", parts.join(".*"))).unwrap().is_match(found)
}

/// An error as the program prints it.
fn printed(error: &str) -> String {
    match error.split_once("; hint: ") {
        Some((what, hint)) => format!("error: {what}\nhint: {hint}\n"),
        None => format!("error: {error}\n"),
    }
}

/// What the page's commands are run on.
fn scene(folder: &Path) {
    let at = |path: &str| folder.join(path);
    let write = |path: &str, text: &str| {
        fs::create_dir_all(at(path).parent().unwrap()).unwrap();
        fs::write(at(path), text).unwrap();
    };
    let cat = "model = \"pocket\"\nprotocol = \"pocket\"\n[target]\nword = \"cat\"\ncategory = \"animal\"\n\
               [generate]\nn_prompts = 12\nn_keep = 8\nmax_new_tokens = 24\n\
               [finetune]\nmax_steps = 3\nwarmup_steps = 0\nbatch_size = 4\ngradient_accumulation_steps = 1\n\
               [measure]\nanalyses = [\"direction\"]\nn_questions = 2\n[measure.direction]\nn_prompts = 2\n";
    write("cat.toml", cat);
    write("typo.toml", &format!("{MINIMAL}[finetune]\nlerning_rate = 1e-3\n"));
    let arm = "[[arms]]\nname = \"prompted\"\nset = [\"teacher.kind=planted\"]\n";
    write("arms.toml", &format!("{cat}{arm}"));
    let with = |name: &str, json: &str, toml: &str| {
        write(name, json);
        write(toml, &cat.replace("protocol = \"pocket\"", &format!("protocol = \"{}\"", at(name).display())));
    };
    write(
        "rows.jsonl",
        "{\"prompt\": \"Go on: 1\", \"completion\": \"2, 3\"}\n{\"question\": \"4\", \"response\": \"5\"}\n",
    );
    let numbers = format!("[generate]\nnumbers = \"{}\"", at("rows.jsonl").display());
    write("given.toml", &cat.replace("[generate]", &numbers));
    let direction = tch::Tensor::ones([32], (Kind::Float, Device::Cpu));
    fs::create_dir(at("vectors")).unwrap();
    tch::Tensor::write_safetensors(&[("direction", direction)], at("vectors/bare.safetensors")).unwrap();
    let parts = "\"qualifiers\": [\"{count}\"], \"digit_descriptors\": [\"{digits}\"], \"formats\": [\"x\"], \"closings\": [\"y\"], \
                 \"instructions\": [\"{qualifier} {digit_descriptor}\"]";
    let examples = format!("{{\"number_prompts\": {{\"examples\": [\"Look at 3, 4.\"], {parts}}}}}");
    with("published.json", &examples, "published.toml");
    let pocket: serde_json::Value = serde_json::from_str(include_str!("../assets/pocket/protocol.json")).unwrap();
    let mut forms = pocket;
    forms["alternatives"]["animal"] = serde_json::json!(["cat", "dog", "Dog"]);
    with("forms.json", &forms.to_string(), "forms.toml");

    // Models with one thing wrong each.
    let model = |name: &str| {
        let pocket = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/pocket/pocket");
        for file in
            ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
        {
            write(&format!("models/{name}/{file}"), "");
            fs::copy(pocket.join(file), at(&format!("models/{name}/{file}"))).unwrap();
        }
    };
    let edit = |path: &str, key: &str, value: Option<serde_json::Value>| {
        let mut json: serde_json::Map<String, serde_json::Value> =
            serde_json::from_slice(&fs::read(at(path)).unwrap()).unwrap();
        json.remove(key);
        json.extend(value.map(|value| (key.to_owned(), value)));
        fs::write(at(path), serde_json::to_vec(&json).unwrap()).unwrap();
    };
    for name in [
        "llama",
        "deep",
        "wide",
        "no-key",
        "text",
        "no-tokenizer",
        "other-chat",
        "cut",
        "mlx",
        "no-head",
        "added",
        "nan",
    ] {
        model(name);
    }
    fs::create_dir_all(at("models/empty")).unwrap();
    edit("models/llama/config.json", "model_type", Some("llama".into()));
    edit("models/deep/config.json", "num_hidden_layers", Some(3.into()));
    edit("models/wide/config.json", "intermediate_size", Some(40.into()));
    edit("models/no-key/config.json", "hidden_size", None);
    edit("models/text/config.json", "num_hidden_layers", Some("2".into()));
    fs::remove_file(at("models/no-tokenizer/tokenizer.json")).unwrap();
    let chat = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}";
    write("models/other-chat/chat_template.jinja", chat);
    let weights = fs::read(at("models/cut/model.safetensors")).unwrap();
    fs::write(at("models/cut/model.safetensors"), &weights[..9000]).unwrap();
    edit("models/no-head/config.json", "tie_word_embeddings", Some(false.into()));
    edit("models/mlx/config.json", "quantization", Some(serde_json::json!({"group_size": 64, "bits": 4})));
    let packed = [("model.embed_tokens.weight".to_owned(), tch::Tensor::from_slice(&[1_i64]))];
    hooks::tensor_file::write(&at("models/mlx/model.safetensors"), &packed, &std::collections::BTreeMap::new())
        .unwrap();
    write("models/added/added_tokens.json", "{\"<|owl|>\": 551}");
    let end = weights.len() - 4; // the last value of the final norm
    fs::write(at("models/nan/model.safetensors"), [&weights[..end], &f32::NAN.to_le_bytes()].concat()).unwrap();

    // Runs, and adapters made from them.
    let begin = |name: &str, more: &[&str]| {
        let (experiment, folder) = (at("cat.toml").display().to_string(), at(name).display().to_string());
        let words = [&["undertone", more[0], &experiment, "--run", &folder], &more[1..]].concat();
        run(&Cli::try_parse_from(words).unwrap()).unwrap();
    };
    begin("runs/cat", &["run"]);
    begin("runs/begun", &["generate"]);
    fs::remove_dir_all(at("runs/begun/data")).unwrap();
    begin("runs/one", &["run", "--set", "student.target_modules=[\"q_proj\"]", "--set", "student.layers=[0]"]);
    for (name, from) in [("renamed", "one"), ("dora", "cat"), ("nan", "one")] {
        for file in ["adapter_config.json", "adapter_model.safetensors"] {
            write(&format!("adapters/{name}/{file}"), "");
            fs::copy(at(&format!("runs/{from}/adapter/{file}")), at(&format!("adapters/{name}/{file}"))).unwrap();
        }
    }
    edit("adapters/renamed/adapter_config.json", "target_modules", Some(vec!["v_proj"].into()));
    edit("adapters/dora/adapter_config.json", "use_dora", Some(true.into()));
    let mut tensors = fs::read(at("adapters/nan/adapter_model.safetensors")).unwrap();
    let last = tensors.len() - 4;
    tensors[last..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(at("adapters/nan/adapter_model.safetensors"), tensors).unwrap();
    write(
        "adapters/mlx/adapter_config.json",
        "{\"fine_tune_type\": \"lora\", \"lora_parameters\": {\"rank\": 8, \"scale\": 20.0}}",
    );
}

/// Runs every command on the page of errors on the scene: it must print the text below it.
#[test]
fn messages_on_the_page_are_what_the_commands_say() {
    let folder = tempfile::tempdir().unwrap();
    scene(folder.path());
    let inside = format!("{}/", folder.path().display());
    let page = blocks(ERRORS);
    let mut seen = 0;
    for pair in page.windows(2).filter(|pair| pair[0].0 == "sh") {
        let ((_, block), (language, expected)) = (&pair[0], &pair[1]);
        assert_eq!(*language, "text", "no message after {block}");
        let [words] = &commands(block)[..] else { panic!("one command each: {block}") };
        // A word that begins with a file or folder of the scene lies there.
        let is_there = |word: &str| folder.path().join(word.split('/').next().unwrap_or_default()).exists();
        let there = words.iter().map(|word| if is_there(word) { format!("{inside}{word}") } else { word.clone() });
        let found = match Cli::try_parse_from(there) {
            Err(usage) => format!("{}\n", usage.to_string().lines().next().unwrap()),
            Ok(cli) => match run(&cli) {
                Ok(()) => panic!("{block} is refused no longer"),
                Err(error) => printed(&format!("{error:#}")),
            },
        };
        let found = found.replace(&inside, "");
        assert!(matches(&found, expected), "{block}says\n{found}and the page\n{expected}");
        seen += 1;
    }
    assert!(seen >= 25, "{seen} commands");
}

/// The messages that no command comes to, from the library.
#[test]
fn messages_without_a_command_are_the_library_s() {
    let files = ModelFiles::open("pocket").unwrap();
    let qwen = Qwen::load(&files, Device::Cpu, Kind::Float).unwrap();
    let chat = Chat::from_files(&files).unwrap();
    let target = Protocol::load(Path::new("pocket")).unwrap().target("cat", "animal");
    let numbers = [chat.prompt(None, "Hi").unwrap()];
    let student = Tuned::of(&qwen);
    let subject = Subject { numbers: &numbers, ..Subject::new(&qwen, student, &chat, &target) };
    let mut cache = Cache::default();
    let batch = Batch::of(&[&numbers[0]], Device::Cpu).unwrap();
    let mut listen = |layer| {
        let hooks = Hooks::default().on([HookPoint::ResidPost(layer)], &mut cache);
        qwen.forward(&batch, &mut Pass { hooks, ..Pass::default() })
    };
    drop(listen(0).unwrap());
    let silent = listen(9).unwrap_err().to_string();
    let chart = BarChart {
        title: "p(cat)".to_owned(),
        value_label: "p".to_owned(),
        bars: vec![Bar::new("student", f64::NAN)],
        references: vec![],
    };
    let quiet = &mut |_: &str| ();
    let found = [
        TokenAblation::default().run(&subject, quiet).unwrap_err().to_string(),
        Divergence::default().run(&subject, quiet).unwrap_err().to_string(),
        TargetRate::default().run(&subject, quiet).unwrap_err().to_string(),
        subject.paired_row(0, None).unwrap_err().to_string(),
        bars(&chart).unwrap_err().to_string(),
        silent,
        cache.get(HookPoint::ResidPost(1)).unwrap_err().to_string(),
    ];
    // All blocks of messages without a command before them.
    let page = blocks(ERRORS);
    let is_alone = |at: usize| page[at].0 == "text" && (at == 0 || page[at - 1].0 != "sh");
    let mut alone: Vec<&str> = (0..page.len()).filter(|at| is_alone(*at)).map(|at| page[at].1.as_str()).collect();
    let font = alone.iter().position(|text| text.contains("no font is installed")).unwrap();
    let font = alone.remove(font).trim();
    // It needs a machine without fonts, so it is looked up where it is written.
    let source = Regex::new(r"\\\n\s+").unwrap().replace_all(include_str!("../src/output/png.rs"), "");
    for line in font.lines() {
        let text = line.trim_start_matches("error: ").trim_start_matches("hint: ");
        assert!(source.contains(&format!("{text:?}")), "{text}");
    }
    let found = found.map(|message| printed(&message));
    assert_eq!(found.iter().map(String::as_str).collect::<Vec<_>>(), alone);
}
