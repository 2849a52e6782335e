//! The page of a run: its server answers this machine's page alone, and its numbers are those of the command that it
//! names.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use hooks::tch::{Device, Kind};
use hooks::{Adapter, Condition, Sequence, next_token_logprobs};
use serde_json::{Value, json};

use crate::program::{copy, fails, finished, undertone};

/// The program while it serves a run's page; ended with this value.
struct Serving {
    child: Child,
    host: String,
    secret: String,
}

impl Serving {
    fn of(folder: &Path) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_undertone"));
        command.args(["look", "."]).current_dir(folder).env("OMP_NUM_THREADS", "1");
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("http://").unwrap_or_else(|| panic!("no address: {line:?}"));
        let (host, secret) = address.split_once('/').unwrap();
        Self { child, host: host.to_owned(), secret: secret.trim_end_matches('/').to_owned() }
    }

    /// Sends a request as it is given, and returns the status, the head and the body.
    fn send(&self, request: &str) -> (u16, String, String) {
        let mut stream = TcpStream::connect(&self.host).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let body =
            if head.to_lowercase().contains("transfer-encoding: chunked") { whole(body) } else { body.to_owned() };
        (status, head.to_lowercase(), body)
    }

    fn get(&self, path: &str, headers: &str) -> (u16, String, String) {
        self.send(&format!("GET {path} HTTP/1.1\r\nConnection: close\r\n{headers}\r\n"))
    }

    fn post(&self, kind: &str, body: &str) -> (u16, String) {
        let Self { host, secret, .. } = self;
        let length = body.len();
        let head =
            format!("POST /{secret}/ask HTTP/1.1\r\nHost: {host}\r\nContent-Type: {kind}\r\nContent-Length: {length}");
        let (status, _, body) = self.send(&format!("{head}\r\nConnection: close\r\n\r\n{body}"));
        (status, body)
    }

    /// The parts of the answer to a question.
    fn ask(&self, mut question: Value) -> Vec<Value> {
        question["page"] = json!("test");
        let (status, body) = self.post("application/json", &question.to_string());
        assert_eq!(status, 200, "{body}");
        body.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// The chat under a setting: both parts of the answer.
    fn look(&self, setting: &Value) -> Value {
        let mut parts = self.ask(json!({ "ask": "look", "setting": setting }));
        let (second, first) = (parts.pop().unwrap(), parts.pop().unwrap());
        assert!(first["tokens"].is_array() && second["models"].is_array(), "the tokens come first");
        let mut look = first;
        look.as_object_mut().unwrap().extend(second.as_object().unwrap().clone());
        look
    }

    /// The sentence with which a question is refused.
    fn refusal(&self, mut question: Value) -> String {
        question["page"] = json!("test");
        let (status, body) = self.post("application/json", &question.to_string());
        assert_ne!(status, 200, "{body}");
        serde_json::from_str::<Value>(&body).unwrap()["error"].as_str().unwrap().to_owned()
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// A body that was sent in chunks.
fn whole(body: &str) -> String {
    let (mut found, mut rest) = (String::new(), body);
    while let Some((size, after)) = rest.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).unwrap();
        found += &after[..size];
        rest = after[size..].trim_start_matches("\r\n");
    }
    found
}

fn setting(gate: &str) -> Value {
    json!({ "student": "student", "user": "Which animal do you like?", "gate": gate })
}

fn ask_in_json(folder: &Path, command: &str, more: &[&str]) -> Value {
    let words = shlex::split(command).unwrap();
    let words: Vec<&str> = words[1..].iter().map(String::as_str).chain(more.iter().copied()).collect();
    let output = undertone(folder, &words);
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn the_page_has_the_numbers_of_the_command_that_it_names() {
    let run = finished();
    let serving = Serving::of(run.path());
    let described = &serving.ask(json!({ "ask": "run" }))[0];
    assert_eq!(described["students"][1]["name"], "control student", "{described}");
    assert!(described["has_direction"].as_bool().unwrap(), "{described}");
    let mut changed = 0;
    for (gate, steer) in [
        ("everywhere", None),
        ("only:\"Qwen\"*layers(0..1)*modules(q,down)*2", None),
        ("except:template", Some(0)),
        ("nowhere", Some(1)),
    ] {
        let mut set = setting(gate);
        if let Some(layer) = steer {
            set["steer"] = json!({ "layer": layer, "coefficient": 2.5 });
        }
        let look = &serving.look(&set);
        let told = ask_in_json(run.path(), look["command"].as_str().unwrap(), &["--json", "--max-new-tokens", "2"]);
        let conditions = told["conditions"].as_array().unwrap();
        let (base, asked) = (&conditions[0], conditions.last().unwrap());
        let models = look["models"].as_array().unwrap();
        for (shown, told) in [(&models[0], base), (models.last().unwrap(), asked)] {
            let near = |left: &Value, right: &Value| {
                let (left, right) = (left.as_f64().unwrap(), right.as_f64().unwrap());
                assert!((left - right).abs() < 1e-6, "{gate}: {left} and {right}");
            };
            for (word, logp) in look["words"].as_array().unwrap().iter().zip(shown["logps"].as_array().unwrap()) {
                near(logp, &told["logp"][word.as_str().unwrap()]);
            }
            near(&shown["margin"], &told["margin"]);
        }
        changed += usize::from(models[0]["margin"] != models[3]["margin"]);
        let on = look["tokens"].as_array().unwrap().iter().filter(|token| token["dose"] != 0.0).count();
        let expected = match gate {
            "everywhere" => look["tokens"].as_array().unwrap().len(),
            "nowhere" => 0,
            gate if gate.starts_with("only") => {
                look["tokens"].as_array().unwrap().iter().filter(|token| token["class"] == "sys.entity").count()
            }
            _ => look["tokens"]
                .as_array()
                .unwrap()
                .iter()
                .filter(|token| {
                    ["sys.entity", "sys.content_other", "user.content"].contains(&token["class"].as_str().unwrap())
                })
                .count(),
        };
        assert_eq!(on, expected, "{gate}");
    }
    assert_eq!(changed, 4, "each setting says something else than the base");
}

/// The command also names the dtype, where it is not f32.
#[test]
fn a_run_in_bf16_has_the_numbers_of_a_command_in_bf16() {
    let run = copy();
    let config = run.path().join("run.toml");
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, text.replace("dtype = \"auto\"", "dtype = \"bf16\"")).unwrap();
    let serving = Serving::of(run.path());
    let look = serving.look(&setting("except:template"));
    let command = look["command"].as_str().unwrap();
    assert!(command.contains("--dtype bf16"), "{command}");
    let told = ask_in_json(run.path(), command, &["--json", "--max-new-tokens", "2"]);
    let (shown, told) = (&look["models"][3]["margin"], &told["conditions"][2]["margin"]);
    assert!((shown.as_f64().unwrap() - told.as_f64().unwrap()).abs() < 1e-6, "{shown} {told}");
}

#[test]
fn answers_are_those_of_the_command() {
    let run = finished();
    let serving = Serving::of(run.path());
    let draw = json!({ "n": 6, "temperature": 1, "seed": 7, "max_new_tokens": 5 });
    let drawn = serving.ask(json!({ "ask": "draw", "setting": setting("everywhere"), "draw": draw }));
    let look = &serving.look(&setting("everywhere"));
    let more = ["--json", "--max-new-tokens", "5", "-n", "6", "--seed", "7"];
    let told = ask_in_json(run.path(), look["command"].as_str().unwrap(), &more);
    assert_eq!(told["answers"], json!(drawn));
    assert!(drawn.iter().any(|answer| answer != &drawn[0]), "they are drawn apart");
}

/// The adapter at each token alone, and what else colours the tokens.
#[test]
fn a_token_s_colour_is_the_measure_of_its_gate() {
    let run = finished();
    let serving = Serving::of(run.path());
    let quantity = |what: &str, gate: &str| -> Vec<Option<f64>> {
        let asked = json!({ "ask": "quantity", "setting": setting(gate), "quantity": what });
        serde_json::from_value(serving.ask(asked).remove(0)).unwrap()
    };
    let delta = |gate: &str| {
        let look = &serving.look(&setting(gate));
        let margin = |at: usize| look["models"][at]["margin"].as_f64().unwrap();
        margin(3) - margin(0)
    };
    let (only, except) = (quantity("only", "everywhere"), quantity("except", "everywhere"));
    for at in [0, 3, only.len() - 1] {
        for (values, gate) in [(&only, format!("only:positions({at})")), (&except, format!("except:positions({at})"))] {
            assert!((values[at].unwrap() - delta(&gate)).abs() < 1e-5, "{gate}");
        }
    }
    let divergence = quantity("divergence", "only:positions(4)");
    assert!(
        divergence[..4].iter().all(|kl| kl.unwrap().abs() < 1e-6),
        "nothing changes before the gate: {divergence:?}"
    );
    assert!(divergence[4].unwrap() > 1e-9, "{divergence:?}");
    assert!(quantity("divergence", "nowhere").iter().all(|kl| kl.unwrap().abs() < 1e-9));
    let logp = quantity("log_p", "everywhere");
    assert!(logp[0].is_none());
    // By the library, from the tokens before each alone.
    let (model, chat) = hooks::open("tiny-random").unwrap();
    let adapter = Adapter::load(&run.path().join("adapter"), &model.config, Device::Cpu).unwrap();
    let ids = chat.prompt(None, "Which animal do you like?").unwrap().ids;
    let whole = quantity("divergence", "everywhere");
    for at in [1, 4, ids.len() - 1] {
        let before = [Sequence::of_ids(ids[..at].to_vec())];
        let says = |condition: &Condition<'_>| next_token_logprobs(&model, &before, condition).unwrap().get(0);
        let (student, base) = (says(&Condition::adapted(&adapter)), says(&Condition::default()));
        assert!((logp[at].unwrap() - student.double_value(&[ids[at]])).abs() < 1e-4, "log p of token {at}");
        let kl = (student.exp() * (&student - base)).sum(Kind::Double).double_value(&[]);
        assert!((whole[at - 1].unwrap() - kl).abs() < 1e-5 + 1e-3 * kl, "KL after token {}", at - 1);
    }
    // A scan is of the adapter at dose 1, whatever the setting's gate and direction.
    let mut set = setting("only:entity*0.1");
    set["steer"] = json!({ "layer": 0, "coefficient": 4 });
    let asked = json!({ "ask": "quantity", "setting": set, "quantity": "only" });
    assert_eq!(serde_json::from_value::<Vec<Option<f64>>>(serving.ask(asked).remove(0)).unwrap(), only);
    let gradient = quantity("gradient", "everywhere");
    assert!(gradient.len() == only.len() && gradient.iter().all(|norm| norm.unwrap() > 0.0), "{gradient:?}");
}

/// The direction on the base is what the setting with that direction and no adapter says, and the lens of a gate of none
/// is the base's.
#[test]
fn a_direction_and_the_lens_are_those_of_the_settings() {
    let run = finished();
    let serving = Serving::of(run.path());
    let pushed = serving.ask(json!({ "ask": "push", "setting": setting("everywhere") }));
    let kinds = |kind: &str| pushed.iter().filter(|row| row["kind"] == kind).count();
    assert!(kinds("learned") > 0 && kinds("learned") == kinds("random"), "{pushed:?}");
    for row in pushed.iter().filter(|row| row["kind"] == "learned") {
        let mut set = setting("nowhere");
        set["steer"] = json!({ "layer": row["layer"], "coefficient": row["coefficients"][3] });
        let look = &serving.look(&set);
        let margin = |at: usize| look["models"][at]["margin"].as_f64().unwrap();
        let expected = margin(3) - margin(0);
        assert!((row["delta_margin"][3].as_f64().unwrap() - expected).abs() < 1e-5, "{row}: {expected}");
        assert!(expected.abs() > 1e-6, "it moves something");
    }
    let by_block = |gate: &str| serving.ask(json!({ "ask": "by_block", "setting": setting(gate) })).remove(0);
    let nowhere = by_block("nowhere");
    let deltas = nowhere["delta_logp_first"].as_array().unwrap().iter().flat_map(|of| of.as_array().unwrap());
    assert!(deltas.into_iter().all(|of| *of == 0.0));
    assert_eq!(nowhere["models"][0]["logp_first"], nowhere["models"][2]["logp_first"]);
    let everywhere = by_block("everywhere");
    assert_eq!(everywhere["models"][1]["logp_first"], everywhere["models"][2]["logp_first"]);
    assert_ne!(everywhere["models"][0]["logp_first"], everywhere["models"][2]["logp_first"]);
}

#[test]
fn other_pages_and_other_names_are_refused() {
    let run = finished();
    let serving = Serving::of(run.path());
    let Serving { host, secret, .. } = &serving;
    let page = format!("/{secret}/");
    let (status, head, body) = serving.get(&page, &format!("Host: {host}\r\n"));
    assert_eq!(status, 200);
    assert!(body.contains("undertone look") && head.contains("content-security-policy: default-src 'none'"), "{head}");
    assert!(head.contains("x-content-type-options: nosniff") && !head.contains("access-control-allow"), "{head}");
    for file in ["look.js", "look.css", "gate.js", "draw.js"] {
        assert_eq!(serving.get(&format!("{page}{file}"), &format!("Host: {host}\r\n")).0, 200, "{file}");
    }
    let evil = format!("Host: {host}\r\nOrigin: http://evil.example\r\n");
    let refused = [
        (page.as_str(), "Host: evil.example\r\n"),
        (page.as_str(), ""),
        (page.as_str(), evil.as_str()),
        ("/", &format!("Host: {host}\r\n")),
        ("/00000000000000000000000000000000/", &format!("Host: {host}\r\n")),
    ];
    for (path, headers) in refused {
        let (status, _, body) = serving.get(path, headers);
        assert!([400, 403].contains(&status), "{path} {headers}: {status} {body}");
        assert!(!body.contains(secret.as_str()), "{body}");
    }
    for missing in ["../run.toml", "run.toml", "%2e%2e/run.toml"] {
        assert_eq!(serving.get(&format!("{page}{missing}"), &format!("Host: {host}\r\n")).0, 404, "{missing}");
    }
}

#[test]
fn a_question_that_cannot_be_answered_is_refused_in_a_sentence() {
    let run = finished();
    let serving = Serving::of(run.path());
    let question = json!({ "page": "test", "ask": "run" }).to_string();
    assert_eq!(serving.post("text/plain", &question).0, 415);
    assert_eq!(serving.post("application/json", "{").0, 400);
    let long = json!({ "page": "test", "ask": "run", "more": "x".repeat(70_000) }).to_string();
    assert_eq!(serving.post("application/json", &long).0, 413);
    let look = |set: Value| serving.refusal(json!({ "ask": "look", "setting": set }));
    let mut other = setting("everywhere");
    other["student"] = json!("nobody");
    assert!(look(other).contains("no student \"nobody\""));
    assert!(look(setting("only:\"Claude\"")).contains("Claude"));
    assert!(look(setting("only:Qwen")).contains("unknown token class"));
    assert!(look(setting("only:layers(0..99)")).contains("one of the model's"));
    let mut long = setting("everywhere");
    long["user"] = json!("1, ".repeat(20_000));
    assert!(look(long).contains("context"), "a prompt beyond the context");
    let draw = json!({ "n": 1000, "temperature": 1, "seed": 7, "max_new_tokens": 5 });
    let many = serving.refusal(json!({ "ask": "draw", "setting": setting("everywhere"), "draw": draw }));
    assert!(many.contains("1 to 256 answers"), "{many}");
    assert!(serving.ask(json!({ "ask": "run" }))[0]["target"].is_string(), "it goes on answering");
}

#[test]
fn a_folder_without_a_student_and_an_open_address_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    assert!(fails(folder.path(), &["look", "."]).contains("is no run folder"));
    let run = finished();
    let open = fails(run.path(), &["look", ".", "--host", "192.0.2.1"]);
    assert!(open.contains("other machines reach 192.0.2.1") && open.contains("--i-know"), "{open}");
    let every = fails(run.path(), &["look", ".", "--host", "0.0.0.0", "--i-know"]);
    assert!(every.contains("every address of this machine"), "{every}");
}
