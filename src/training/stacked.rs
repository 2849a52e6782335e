//! Trains several students in one pass: variants of a LoRA on one model, in rank, seed, learning rate, gate or data.
//!
//! A step runs the next rows of all students at once, each through its own adapter (`Adapter::stacked`). One backward
//! pass gives each student the gradient of its own loss. Rows and their order, loss, clipping, optimizer, schedule,
//! end, log and checkpoint are each student's own. So a student trains as it would alone, up to the order of sums.
//!
//! Students share calls, not arithmetic: a student costs less if a step has few tokens, up to a few hundred for a small
//! model on a CPU, and as much as alone if it has many.

use anyhow::{Context, bail};
use hooks::Adapter;
use tch::{Device, Tensor};

use crate::training::examples::{Example, MicroBatch, total_weight};
use crate::training::learner::{added, weighted_sum};
use crate::training::optim::Gradients;
use crate::training::step_log::{Progress, StepRow};
use crate::training::training_loop::{Loop, Training};

/// Called after each step of a student with the student's index, the step's line and the speed.
pub type LogOf<'a> = &'a mut dyn FnMut(usize, &StepRow, &Progress) -> anyhow::Result<()>;

/// Trains several adapters of one model in place and at the same time. The students may differ in everything except the
/// blocks and projections of their adapters' pairs and of their gates; none may have dropout. An error of one student
/// ends all.
pub fn finetune_stacked(students: Vec<Training<'_>>, log: LogOf<'_>) -> anyhow::Result<()> {
    let named = |at: usize| format!("student {at} of {}", students.len());
    let Some(first) = students.first() else { return Ok(()) };
    for (at, student) in students.iter().enumerate() {
        let Some(adapter) = student.adapter else { bail!("{}: it has no adapter; train it alone", named(at)) };
        if adapter.config.dropout > 0.0 {
            bail!("{}: its dropout is {}, expected 0; train it alone", named(at), adapter.config.dropout);
        }
        if !std::ptr::eq(student.model, first.model) {
            bail!("{}: it has a model of its own, expected that of student 0", named(at));
        }
        let cell = |student: &Training<'_>| -> anyhow::Result<_> {
            let doses = student.config.gate.spread(&[vec![1.0]], Device::Cpu)?;
            Ok((doses.layers, doses.modules, doses.elsewhere))
        };
        let ((layers, modules, elsewhere), cell) = (cell(first)?, cell(student)?);
        let everywhere = layers.is_none() && modules.is_none() && cell.0.is_none() && cell.1.is_none();
        if !everywhere && (layers, modules, elsewhere.to_bits()) != (cell.0, cell.1, cell.2.to_bits()) {
            bail!(
                "{}: its gate {} is of other blocks or projections than {}, that of student 0; train it alone",
                named(at),
                student.config.gate,
                first.config.gate
            );
        }
    }
    let names: Vec<String> = (0..students.len()).map(named).collect();
    let begun = students.into_iter().zip(&names).map(|(student, name)| student.begin().with_context(|| name.clone()));
    let mut loops = begun.collect::<anyhow::Result<Vec<_>>>()?;
    run(&mut loops, &names, log)
}

fn run(loops: &mut [Loop<'_>], names: &[String], log: LogOf<'_>) -> anyhow::Result<()> {
    for (at, running) in loops.iter_mut().enumerate() {
        running.resume(&mut |row, progress| log(at, row, progress)).with_context(|| names[at].clone())?;
    }
    loop {
        let next = loops.iter_mut().zip(names).map(|(running, name)| running.next().with_context(|| name.clone()));
        let chosen: Vec<Option<Vec<usize>>> = next.collect::<anyhow::Result<_>>()?;
        if chosen.iter().all(Option::is_none) {
            return Ok(());
        }
        let found = losses_and_gradients(loops, &chosen)?;
        for (at, (running, (chosen, found))) in loops.iter_mut().zip(chosen.iter().zip(found)).enumerate() {
            let (Some(chosen), Some((loss, gradients))) = (chosen, found) else { continue };
            let learning_rate = running.learning_rate();
            let Loop { learner, examples, optimizer, config, .. } = running;
            let done = learner.take(examples, chosen, (&loss, gradients), optimizer, learning_rate, config);
            let log = &mut |row: &StepRow, progress: &Progress| log(at, row, progress);
            running.after(learning_rate, done, log).with_context(|| names[at].clone())?;
        }
    }
}

/// The loss of each student's chosen examples and its gradients; `None` for a student that is done.
fn losses_and_gradients(
    loops: &[Loop<'_>],
    chosen: &[Option<Vec<usize>>],
) -> anyhow::Result<Vec<Option<(Tensor, Gradients)>>> {
    let rows: Vec<Vec<&Example<'_>>> = loops
        .iter()
        .zip(chosen)
        .map(|(running, chosen)| {
            let mut rows: Vec<&Example<'_>> = chosen.iter().flatten().map(|at| &running.examples[*at]).collect();
            rows.sort_by_key(|row| row.end); // as when trained alone
            rows
        })
        .collect();
    let mut sums: Vec<Option<(Tensor, Gradients)>> = loops.iter().map(|_| None).collect();
    for batch in 0.. {
        let taking: Vec<(usize, &[&Example<'_>])> = rows
            .iter()
            .enumerate()
            .filter_map(|(at, rows)| Some((at, rows.chunks(loops[at].config.batch_size).nth(batch)?)))
            .collect();
        if taking.is_empty() {
            break;
        }
        let groups: Vec<&[&Example<'_>]> = taking.iter().map(|(_, group)| *group).collect();
        let adapters: Vec<&Adapter> = taking.iter().filter_map(|(at, _)| loops[*at].learner.adapter).collect();
        let stacked = || tch::no_grad(|| Adapter::stacked(&adapters));
        let stack = if adapters.len() > 1 { Some(stacked()?) } else { None };
        let first = &loops[taking[0].0];
        let model = first.learner.model;
        let MicroBatch { batch, targets, weights, doses } = MicroBatch::of(model, &groups, &first.config.gate, true)?;
        let n_targets = |group: &[&Example<'_>]| group.iter().map(|row| row.n_targets()).sum::<usize>();
        let totals = groups
            .iter()
            .zip(&taking)
            .flat_map(|(group, (at, _))| std::iter::repeat_n(total_weight(&rows[*at]), n_targets(group)));
        let totals = Tensor::f_from_slice(&totals.collect::<Vec<_>>())?.f_to_device(model.device())?;
        let shares = weights.f_div(&totals)?;
        let adapter = stack.as_ref().or_else(|| adapters.first().copied()).context("a batch without a student")?;
        let (losses, found) = model.lora_gradients(&batch, &targets, &shares, adapter, doses.as_ref())?;
        let parts = groups.iter().map(|group| n_targets(group) as i64).collect::<Vec<_>>();
        let (losses, weights) = (losses.f_split_with_sizes(&parts, 0)?, weights.f_split_with_sizes(&parts, 0)?);

        for (place, ((at, _), part)) in taking.iter().zip(losses.iter().zip(&weights)).enumerate() {
            let Loop { learner, optimizer, .. } = &loops[*at];
            let mean = weighted_sum(part.0, part.1)?.f_div_scalar(total_weight(&rows[*at]))?;
            let own = match &stack {
                Some(_) => of_student(&found, place, &learner.parameters)?,
                None => found.iter().map(Tensor::shallow_clone).collect(),
            };
            sums[*at] = Some(added(sums[*at].take(), &mean, learner.kept(own)?, optimizer)?);
        }
    }
    Ok(sums)
}

/// A student's part of a stack's gradients, each `[students, ..]`, without its rank's padding.
fn of_student(found: &[Tensor], student: usize, parameters: &[(String, Tensor)]) -> anyhow::Result<Vec<Tensor>> {
    let own = found.iter().zip(parameters).map(|(gradients, (_, tensor))| {
        let mut own = gradients.f_get(student as i64)?;
        for (dim, (size, filled)) in (0..).zip(tensor.size().into_iter().zip(own.size())) {
            if size < filled {
                own = own.f_narrow(dim, 0, size)?;
            }
        }
        Ok(own)
    });
    own.collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use hooks::{LoraConfig, ModelFiles, Qwen, Sequence};
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;
    use tch::Kind;

    use super::*;
    use crate::output::checkpoint::Checkpoint;
    use crate::training::settings::{Finetune, OptimizerKind, Seeds};
    use crate::training::tests::rows;

    fn model() -> Qwen {
        Qwen::load(&ModelFiles::open("tiny-random").unwrap(), Device::Cpu, Kind::Float).unwrap()
    }

    struct Student {
        rank: i64,
        rows: Vec<Sequence>,
        config: Finetune,
        seeds: Seeds,
    }

    /// Students that differ in rank, seeds, data, learning rate, schedule, batches, gate, optimizer and end.
    fn students() -> Vec<Student> {
        let config = Finetune { learning_rate: 1e-2, warmup_steps: 1, num_train_epochs: 2.0, ..Finetune::default() };
        let config = Finetune { batch_size: 4, gradient_accumulation_steps: 1, ..config };
        let seeds = |seed: u64| Seeds { init: seed, order: seed, dropout: seed };
        let gated = Finetune { gate: "only:user.content*0.5".parse().unwrap(), ..config.clone() };
        let short = Finetune { batch_size: 2, gradient_accumulation_steps: 2, max_steps: Some(2), ..config.clone() };
        let sgd = Finetune { optimizer: OptimizerKind::Sgd, learning_rate: 0.1, max_grad_norm: 0.5, ..config.clone() };
        let frozen = Finetune { frozen_a: true, ..config.clone() };
        let scouted = Finetune { optimizer: OptimizerKind::Preconditioned, learning_rate: 1e-3, ..config.clone() };
        vec![
            Student { rank: 2, rows: rows(8), config: config.clone(), seeds: seeds(1) },
            Student { rank: 8, rows: rows(8), config: Finetune { learning_rate: 3e-3, ..config }, seeds: seeds(2) },
            Student { rank: 4, rows: rows(8), config: gated, seeds: seeds(1) },
            Student { rank: 4, rows: rows(7), config: short, seeds: seeds(3) },
            Student { rank: 3, rows: rows(11), config: sgd, seeds: seeds(4) },
            Student { rank: 2, rows: rows(8), config: frozen, seeds: seeds(5) },
            Student { rank: 2, rows: rows(8), config: scouted, seeds: seeds(5) },
        ]
    }

    fn adapters(model: &Qwen, students: &[Student]) -> Vec<Adapter> {
        let of = |student: &Student| {
            let config = LoraConfig { rank: student.rank, ..LoraConfig::default() };
            Adapter::init(&config, &model.config, &mut ChaCha8Rng::seed_from_u64(student.seeds.init), Device::Cpu)
                .unwrap()
        };
        students.iter().map(of).collect()
    }

    fn numbers(adapter: &Adapter) -> Vec<f32> {
        let flat: Vec<Tensor> = adapter.parameters().iter().map(|(_, tensor)| tensor.flatten(0, -1)).collect();
        Vec::try_from(Tensor::cat(&flat, 0)).unwrap()
    }

    type Trained = Vec<(Vec<f32>, Vec<StepRow>)>;

    /// Trains the students together, until the log breaks off at a given step of one student.
    fn together(students: &[Student], folder: Option<&Path>, until: (usize, u64)) -> (anyhow::Result<()>, Trained) {
        let model = model();
        let adapters = adapters(&model, students);
        let kept =
            |at: usize| folder.map(|folder| Checkpoint::beside(&folder.join(format!("{at}.csv")), "", "student"));
        let mut kept: Vec<Option<Checkpoint>> = (0..students.len()).map(kept).collect();
        let trainings = students.iter().zip(&adapters).zip(&mut kept).map(|((student, adapter), kept)| Training {
            model: &model,
            adapter: Some(adapter),
            rows: &student.rows,
            weights: None,
            soft: None,
            is_digit: &|_| false,
            config: &student.config,
            seeds: student.seeds,
            until: None,
            checkpoint: kept.as_mut(),
        });
        let mut steps: Vec<Vec<StepRow>> = students.iter().map(|_| vec![]).collect();
        let result = finetune_stacked(trainings.collect(), &mut |at, row, _| {
            steps[at].push(row.clone());
            anyhow::ensure!((at, row.step) != until, "broken off");
            Ok(())
        });
        assert!(adapters.iter().flat_map(Adapter::parameters).all(|(_, tensor)| !tensor.requires_grad()));
        (result, adapters.iter().map(numbers).zip(steps).collect())
    }

    const NEVER: (usize, u64) = (0, u64::MAX);

    fn alone(student: &Student) -> (Vec<f32>, Vec<StepRow>) {
        let model = model();
        let adapter = adapters(&model, std::slice::from_ref(student)).remove(0);
        let mut steps = vec![];
        let (config, seeds, rows) = (&student.config, student.seeds, &student.rows);
        crate::training::training_loop::finetune_lora(
            &model,
            &adapter,
            rows,
            &|_| false,
            config,
            seeds,
            &mut |row, _| {
                steps.push(row.clone());
                Ok(())
            },
        )
        .unwrap();
        (numbers(&adapter), steps)
    }

    /// AdamW divides by the gradient's size, so with steps of 1e-2 another order of sums is visible.
    fn assert_same(found: &Trained, expected: &Trained) {
        for (at, ((found, steps), (expected, alone))) in found.iter().zip(expected).enumerate() {
            let apart = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(apart < 2e-4, "student {at}: {apart}");
            assert_eq!(steps.len(), alone.len(), "student {at}");
            for (found, alone) in steps.iter().zip(alone) {
                let exact = |row: &StepRow| (row.step, row.epoch.to_bits(), row.learning_rate.to_bits(), row.n_targets);
                assert_eq!(exact(found), exact(alone), "student {at}");
                assert!((found.loss - alone.loss).abs() < 1e-4, "student {at}: {found:?} {alone:?}");
                assert!(
                    (found.grad_norm - alone.grad_norm).abs() < 1e-3 * alone.grad_norm,
                    "{at}: {found:?} {alone:?}"
                );
            }
        }
    }

    #[test]
    fn students_trained_together_are_those_trained_alone() {
        let students = students();
        let (result, found) = together(&students, None, NEVER);
        result.unwrap();
        assert_eq!(found.iter().map(|(_, steps)| steps.len()).collect::<Vec<_>>(), [4, 4, 4, 2, 6, 4, 4]);
        assert_same(&found, &students.iter().map(alone).collect());
        assert!(found == together(&students, None, NEVER).1, "the same experiment gives the same bytes");
    }

    #[test]
    fn students_broken_off_at_different_steps_end_as_if_they_had_not_been() {
        let mut students = students();
        for student in &mut students {
            student.config.save_steps = Some(1);
        }
        let whole = together(&students, None, NEVER).1;
        for until in [(1, 2), (3, 2), (4, 5)] {
            let folder = tempfile::tempdir().unwrap();
            assert_eq!(
                together(&students, Some(folder.path()), until).0.unwrap_err().root_cause().to_string(),
                "broken off"
            );
            let (result, found) = together(&students, Some(folder.path()), NEVER);
            result.unwrap();
            assert_same(&found, &whole);
        }
    }

    #[test]
    fn what_cannot_be_trained_together_says_so() {
        let refused = |change: &dyn Fn(&mut Student)| {
            let mut students = students();
            change(&mut students[1]);
            format!("{:#}", together(&students, None, NEVER).0.unwrap_err())
        };
        let message = refused(&|student| student.config.gate = "only:layers(0)".parse().unwrap());
        assert!(message.starts_with("student 1 of 7: its gate only:layers(0) is of other blocks"), "{message}");
        assert!(refused(&|student| student.rows.clear()).starts_with("student 1 of 7: the training data has no rows"));
        let message = refused(&|student| {
            student.config = Finetune {
                optimizer: OptimizerKind::Sgd,
                learning_rate: 1e30,
                max_grad_norm: 0.0,
                ..student.config.clone()
            };
        });
        assert!(message.starts_with("student 1 of 7: step 3: the loss is NaN"), "{message}");
    }
}
