//! The pocket models in `assets/pocket/`, compared with transformers on the same folders (`golden/pocket`).

use serde::Deserialize;
use std::collections::BTreeMap;
use tch::{Device, Kind, Tensor};

use hooks::{Chat, Condition, ModelFiles, Qwen, Sampling, completion_logits, generate};

use crate::compare::{FORWARD, assert_close, folder};

#[derive(Deserialize)]
struct Expected {
    system: Option<String>,
    user: String,
    ids: Vec<i64>,
    logits: Vec<f64>,
    answer: String,
}

fn expected() -> BTreeMap<String, Vec<Expected>> {
    serde_json::from_slice(&std::fs::read(folder("pocket").join("expected.json")).unwrap()).unwrap()
}

fn assets(name: &str) -> String {
    format!("{}/assets/pocket/{name}", env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn ids_logits_and_greedy_answers_are_those_of_transformers() {
    for (name, cases) in expected() {
        let files = ModelFiles::open(&name).unwrap();
        let (model, chat) = (Qwen::load(&files, Device::Cpu, Kind::Float).unwrap(), Chat::from_files(&files).unwrap());
        let sampling =
            Sampling { temperature: 0.0, max_new_tokens: 24, stop: chat.stop_ids(), constrain: None, batch: 8 };
        for case in cases {
            let prompt = chat.prompt(case.system.as_deref(), &case.user).unwrap();
            assert_eq!(prompt.ids, case.ids, "{name}: {}", case.user);
            let end = prompt.with_completion(&[chat.end_of_turn()]);
            let ours = completion_logits(&model, &end, &Condition::default()).unwrap().get(0); // [d_vocab]
            let golden = Tensor::from_slice(&case.logits).to_kind(Kind::Float);
            assert_close(&format!("{name}: logits after {:?}", case.user), &ours, &golden, FORWARD);
            let answers = generate(&model, &[prompt], &Condition::default(), &sampling, &[0], &mut |_| ()).unwrap();
            assert_eq!(chat.decode(&answers[0].ids).unwrap(), case.answer, "{name}: {}", case.user);
        }
    }
}

#[test]
fn the_embedded_models_are_the_folders() {
    let fingerprint = |name: &str| ModelFiles::open(name).unwrap().fingerprint();
    for name in ["pocket", "pocket-other"] {
        assert_eq!(fingerprint(name), fingerprint(&assets(name)), "{name}");
    }
    assert_ne!(fingerprint("pocket"), fingerprint("pocket-other"), "two initialisations");
    let size = |name: &str| -> u64 {
        std::fs::read_dir(assets(name)).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum()
    };
    assert!(size("pocket") + size("pocket-other") < 4_000_000);
}
