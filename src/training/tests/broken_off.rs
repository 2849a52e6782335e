//! A training that is broken off: by a kill, without memory, by a loss that is not finite. It goes on from its checkpoint.

use super::*;

/// Trains until the log breaks off at a step, as a kill would, or to the end.
fn trained_until(
    model: &Qwen,
    adapter: Option<&Adapter>,
    config: &Finetune,
    (folder, until): (&Path, u64),
) -> (anyhow::Result<()>, Vec<StepRow>) {
    let mut steps = Vec::new();
    let mut checkpoint = Checkpoint::beside(&folder.join("train.csv"), "", "student");
    let training = Training {
        model,
        adapter,
        rows: &rows(8),
        weights: None,
        soft: None,
        is_digit: &|_| false,
        config,
        seeds: Seeds::default(),
        until: None,
        checkpoint: Some(&mut checkpoint),
    };
    let result = training.run(&mut |row, _| {
        steps.push(row.clone());
        anyhow::ensure!(row.step != until, "broken off");
        Ok(())
    });
    (result, steps)
}

#[test]
fn a_training_that_is_broken_off_at_any_step_ends_as_if_it_had_not_been() {
    let config = Finetune {
        max_steps: Some(7),
        batch_size: 2,
        gradient_accumulation_steps: 1,
        save_steps: Some(1),
        ..settings()
    };
    let momentum = Finetune { optimizer: OptimizerKind::Sgd, momentum: 0.9, learning_rate: 0.1, ..config.clone() };
    let (muon, scouted) = (OptimizerKind::Muon, OptimizerKind::Preconditioned);
    for (name, config, kind, lora) in [
        ("Muon", &Finetune { optimizer: muon, momentum: 0.9, ..config.clone() }, Kind::Float, true),
        ("scales that stay", &Finetune { optimizer: scouted, ..config.clone() }, Kind::Float, true),
        ("a LoRA with dropout", &config, Kind::Float, true),
        (
            "all weights in bf16 with masters",
            &Finetune { learning_rate: 1e-4, ..config.clone() },
            Kind::BFloat16,
            false,
        ),
        ("SGD with momentum", &momentum, Kind::Float, false),
    ] {
        let result = |breaks: &[u64], config: &Finetune| {
            let folder = tempfile::tempdir().unwrap();
            for until in breaks.iter().chain(&[u64::MAX]) {
                // Model and adapter are made anew, as in a new process.
                let model = model(kind);
                let adapter = lora.then(|| adapter(&model, 0.3));
                let (ended, steps) = trained_until(&model, adapter.as_ref(), config, (folder.path(), *until));
                assert_eq!(ended.is_ok(), *until == u64::MAX);
                if ended.is_ok() {
                    let parameters = adapter.map_or_else(|| model.parameters(), |adapter| adapter.parameters());
                    let bits = numbers(&parameters).iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                    return (bits, steps);
                }
            }
            unreachable!()
        };
        let undisturbed = result(&[], config);
        assert_eq!(undisturbed.1.len(), 7);
        for until in 1..=7 {
            assert!(result(&[until], config) == undisturbed, "{name}, broken off at step {until}");
        }
        assert!(result(&[2, 5, 6], config) == undisturbed, "{name}, broken off three times");
        let rarely = Finetune { save_steps: Some(3), ..config.clone() };
        assert!(result(&[5], &rarely) == undisturbed, "{name}, with a checkpoint every three steps");
    }
}

#[test]
fn a_checkpoint_of_another_training_is_not_gone_on_with() {
    let folder = tempfile::tempdir().unwrap();
    let config = Finetune { save_steps: Some(1), ..settings() };
    let steps = |config: &Finetune, until| {
        let model = model(Kind::Float);
        trained_until(&model, Some(&adapter(&model, 0.0)), config, (folder.path(), until)).1
    };
    steps(&config, 3);
    let other = Finetune { learning_rate: 2e-2, ..config.clone() };
    let fresh = trained(&Finetune { save_steps: None, ..other.clone() }, 0.0, Seeds::default()).1;
    assert_eq!(steps(&other, 9), fresh);
}

#[test]
fn a_training_goes_on_with_fewer_rows_at_once() {
    let one = Finetune { batch_size: 4, gradient_accumulation_steps: 1, save_steps: Some(1), ..settings() };
    let one = Finetune { max_steps: Some(6), ..one };
    let four = Finetune { batch_size: 1, gradient_accumulation_steps: 4, ..one.clone() };
    // The weights, and the number of steps that were taken rather than repeated from the checkpoint.
    let train = |config: &Finetune, folder: &Path, until: u64| {
        let model = model(Kind::Float);
        let (adapter, rows, mut taken) = (adapter(&model, 0.0), rows(8), 0);
        let mut checkpoint = Checkpoint::beside(&folder.join("train.csv"), "", "student");
        let (is_digit, seeds, checkpoint) = (&|_| false, Seeds::default(), Some(&mut checkpoint));
        let training = Training {
            model: &model,
            adapter: Some(&adapter),
            rows: &rows,
            weights: None,
            soft: None,
            is_digit,
            config,
            seeds,
            until: None,
            checkpoint,
        };
        let result = training.run(&mut |row, progress| {
            taken += usize::from(progress.tokens > 0);
            anyhow::ensure!(row.step != until, "broken off");
            Ok(())
        });
        assert_eq!(result.is_ok(), until == u64::MAX);
        (numbers(&adapter.parameters()), taken)
    };
    let [folder, other] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    train(&one, folder.path(), 4);
    let (found, taken) = train(&four, folder.path(), u64::MAX);
    assert_eq!(taken, 3, "it goes on behind the checkpoint of step 3");
    let (expected, _) = train(&one, other.path(), u64::MAX);
    assert!(apart(&found, &expected) < 1e-4, "{}", apart(&found, &expected));
}

#[test]
fn a_training_without_memory_says_how_to_go_on() {
    let model = model(Kind::Float);
    let (adapter, rows, config) = (adapter(&model, 0.0), rows(8), settings());
    let (adapter, is_digit, config, seeds) = (Some(&adapter), &|_| false, &config, Seeds::default());
    let training = Training {
        model: &model,
        adapter,
        rows: &rows,
        weights: None,
        soft: None,
        is_digit,
        config,
        seeds,
        until: None,
        checkpoint: None,
    };
    let running = training.begin().unwrap();
    let error = anyhow::anyhow!("libtorch: DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes");
    let said = running.learner.stopped(&error, &running.optimizer, &[], None).to_string();
    assert!(said.contains("allocate 9 bytes; hint: run fewer rows at once"), "{said}");
}

#[test]
fn a_loss_that_is_not_finite_names_its_row_and_the_last_good_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let config = Finetune { batch_size: 3, ..settings() };
    // This model's embedding and unembedding are two tensors, so a broken embedding breaks no other row.
    let files = ModelFiles::open(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/qwen3")).unwrap();
    let model = Qwen::load(&files, Device::Cpu, Kind::Float).unwrap();
    let adapter = adapter(&model, 0.0);
    let mut rows = rows(8);
    rows[6].ids[1] = 5; // a token of no other row
    let embedding = model.parameters().into_iter().find(|(name, _)| name.contains("embed_tokens")).unwrap().1;
    let _ = tch::no_grad(|| embedding.get(5).fill_(f64::NAN));
    let steps = rows_by_step(&config, 8, Seeds::default().order);
    let at = steps.iter().position(|rows| rows.contains(&6)).unwrap() + 1;
    let mut checkpoint = Checkpoint::beside(&folder.path().join("train.csv"), "", "student");
    let training = Training {
        model: &model,
        adapter: Some(&adapter),
        rows: &rows,
        weights: None,
        soft: None,
        is_digit: &|_| false,
        config: &config,
        seeds: Seeds::default(),
        until: None,
        checkpoint: Some(&mut checkpoint),
    };
    let message = format!("{:#}", training.run(&mut |_, _| Ok(())).unwrap_err());
    assert!(message.starts_with(&format!("step {at}: the loss is NaN")), "{message}");
    assert!(message.contains("of its 3 rows the loss of row 6 is not finite"), "{message}");
    let kept = format!("the last good checkpoint is of step {}, {}", at - 1, checkpoint.path().display());
    assert!(if at == 1 { message.contains("no checkpoint") } else { message.contains(&kept) }, "{message}");
    assert_eq!(checkpoint.path().exists(), at > 1);
}
