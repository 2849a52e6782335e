//! The real model against transformers reading the same GGUF: `golden/real/reference.json`, by `scripts/real_reference.py`.
//! `make test-real` runs this; it names the model in `UNDERTONE_REAL_MODEL`, and without that nothing is tested here.

use std::collections::BTreeSet;

use serde::Deserialize;
use tch::{Device, Kind};

use hooks::{Chat, Condition, ModelFiles, Qwen, Sampling, Sequence, generate, next_token_logprobs};

use crate::compare::folder;

/// Both sides are f32 with sums in another order, over 24 layers.
const LOGPROB_TOLERANCE: f64 = 2e-3;

#[derive(Deserialize)]
struct Reference {
    max_new_tokens: usize,
    chats: Vec<Expected>,
}

#[derive(Deserialize)]
struct Expected {
    system: Option<String>,
    user: String,
    text: String,
    ids: Vec<i64>,
    top: Vec<Top>,
    greedy: Vec<i64>,
    greedy_text: String,
}

#[derive(Deserialize)]
struct Top {
    id: i64,
    token: String,
    logprob: f64,
}

#[test]
fn the_real_model_answers_as_in_transformers() {
    let Ok(path) = std::env::var("UNDERTONE_REAL_MODEL") else {
        eprintln!("skipped: no real model was named; `make test-real` does that");
        return;
    };
    let reference = std::fs::read(folder("real").join("reference.json")).unwrap();
    let reference: Reference = serde_json::from_slice(&reference).unwrap();
    let files = ModelFiles::open(&path).unwrap();
    let model = Qwen::load(&files, Device::Cpu, Kind::Float).unwrap();
    let chat = Chat::from_files(&files).unwrap();

    let prompts: Vec<Sequence> = reference
        .chats
        .iter()
        .map(|expected| chat.prompt(expected.system.as_deref(), &expected.user).unwrap())
        .collect();
    for (prompt, expected) in prompts.iter().zip(&reference.chats) {
        assert_eq!(prompt.ids, expected.ids, "the tokens of {:?}", expected.text);
    }

    let logprobs = next_token_logprobs(&model, &prompts, &Condition::default()).unwrap();
    for (row, expected) in reference.chats.iter().enumerate() {
        let row = logprobs.get(row as i64);
        let (_, top) = row.topk(expected.top.len() as i64, 0, true, true);
        let ours: BTreeSet<i64> = Vec::<i64>::try_from(top).unwrap().into_iter().collect();
        assert_eq!(
            ours,
            expected.top.iter().map(|top| top.id).collect(),
            "the likeliest first tokens of {:?}",
            expected.user
        );
        for Top { id, token, logprob } in &expected.top {
            let ours = row.double_value(&[*id]);
            let apart = (ours - logprob).abs();
            assert!(
                apart <= LOGPROB_TOLERANCE,
                "log p({token:?}) after {:?}: {ours}, expected {logprob}, {apart:.1e} apart",
                expected.user
            );
        }
    }

    let stop = chat.stop_ids();
    let sampling = Sampling {
        temperature: 0.0,
        max_new_tokens: reference.max_new_tokens,
        stop: stop.clone(),
        constrain: None,
        batch: 4,
    };
    let streams: Vec<u64> = (0..prompts.len() as u64).collect();
    let answers = generate(&model, &prompts, &Condition::default(), &sampling, &streams, &mut |_| ()).unwrap();
    for (answer, expected) in answers.iter().zip(&reference.chats) {
        let greedy: Vec<i64> = expected.greedy.iter().copied().take_while(|id| !stop.contains(id)).collect();
        let text = chat.decode(&answer.ids).unwrap();
        assert_eq!(
            answer.ids, greedy,
            "the answer to {:?}: {text:?}, expected {:?}",
            expected.user, expected.greedy_text
        );
        assert_eq!(
            answer.stopped,
            greedy.len() < expected.greedy.len(),
            "the end of the answer to {:?}",
            expected.user
        );
    }
}
