use hooks::{Gate, Sampling, generate};

use super::*;
use crate::divergence::{Definition, divergence_tokens};
use crate::fixture::World;

/// Mean log p of the best spelling over the questions.
fn logp(subject: &Subject<'_>, adapter: &Adapter) -> f64 {
    let prompts = subject.question_prompts("x").unwrap();
    let of_form = |form: &String| {
        let ids = subject.chat.encode(form).unwrap();
        let rows: Vec<Sequence> = prompts.iter().map(|prompt| prompt.with_completion(&ids)).collect();
        let logps = completion_logprobs(subject.base, &rows, &Condition::adapted(adapter)).unwrap();
        logps.iter().flatten().map(|logp| f64::from(*logp)).sum::<f64>() / prompts.len() as f64
    };
    subject.target.forms.iter().map(of_form).fold(f64::NEG_INFINITY, f64::max)
}

#[test]
fn a_small_step_does_what_the_alignment_says() {
    let mut world = World::new();
    // The teacher's most likely answers, so that some tokens are divergent.
    let system = world.subject().teacher_system;
    let users: Vec<String> = (0..6).map(|at| format!("Go on: {at}, {}", 7 * at)).collect();
    let prompts: Vec<Sequence> = users.iter().map(|user| world.chat.prompt(system.as_deref(), user).unwrap()).collect();
    let sampling = Sampling { temperature: 0.0, max_new_tokens: 12, stop: vec![], constrain: None, batch: 6 };
    let answers = generate(&world.qwen, &prompts, &Condition::default(), &sampling, &[0; 6], &mut |_| ()).unwrap();
    world.number_users = users.into_iter().zip(answers).map(|(user, answer)| (user, answer.ids)).collect();
    let row = |(user, ids): &(String, Vec<i64>)| world.chat.row(None, user, ids).unwrap();
    world.numbers = world.number_users.iter().map(row).collect();
    let subject = world.subject();
    let adapter = subject.student.adapter.unwrap();
    let divergent = divergence_tokens(&subject, 6, Definition::Schrodi, true).unwrap();
    let found = alignment(&subject, &divergent).unwrap();
    assert!(
        found.divergent.n_tokens > 0 && found.other.n_tokens > 0 && found.cosine.unwrap().abs() <= 1.0,
        "{found:?}"
    );
    for group in [&found.divergent, &found.other] {
        let sum = |of: fn(&AtPart) -> f64| group.parts.iter().map(of).sum::<f64>();
        assert!((sum(|at| at.share.unwrap()) - 1.0).abs() < 1e-5, "{group:?}");
        assert!((sum(|at| at.towards_trait) - group.towards_trait).abs() < 1e-5 * sum(|at| at.towards_trait.abs()));
        assert!(group.parts.iter().all(|at| at.norm > 0.0), "each part is read: {group:?}");
    }
    let rows = subject.number_rows("x", 6).unwrap();
    let mut norms = vec![];
    for (wanted, group) in [(true, &found.divergent), (false, &found.other)] {
        let masks: Vec<Vec<bool>> = rows
            .iter()
            .zip(&divergent)
            .map(|(row, divergent)| {
                let of =
                    |at: usize| at >= row.completion.start && divergent.get(at - row.completion.start) == Some(&true);
                (0..row.ids.len()).map(|at| row.completion.contains(&at) && of(at) == wanted).collect()
            })
            .collect();
        let (parts, n) = sum_by_part(subject.base, adapter, rows, &masks).unwrap();
        let gradients = whole(&parts).unwrap();
        norms.push(gradients);
        let gradients = &norms[norms.len() - 1];
        let rate = 1e-2;
        let step = |sign: f64| {
            tch::no_grad(|| {
                for ((_, tensor), gradient) in adapter.parameters().iter().zip(gradients) {
                    let _ = tensor.shallow_clone().f_sub_(&(gradient * (sign * rate / n as f64))).unwrap();
                }
            });
        };
        step(1.0);
        let after = logp(&subject, adapter);
        step(-2.0);
        let before = logp(&subject, adapter);
        step(1.0);
        let slope = (after - before) / (2.0 * rate);
        let predicted = group.towards_trait;
        assert!((slope - predicted).abs() < 0.03 * predicted.abs() + 2e-4, "{slope} {predicted}");
    }
    // Both groups' sum is the whole row's gradient.
    let both: Vec<Tensor> = norms[0].iter().zip(&norms[1]).map(|(d, o)| d + o).collect();
    let square = dot(&both, &both).unwrap();
    for group in [&found.divergent, &found.other] {
        assert!((group.share.unwrap() * square - group.norm.powi(2)).abs() < 1e-4 * square, "{group:?} {square}");
    }
}

/// Compares with a jackknife by hand, which leaves out each lot and scales the rest up.
#[test]
fn the_error_of_a_length_is_the_jackknifes() {
    let folds: Vec<Vec<Tensor>> = [[3.0, 0.5, 1.0], [2.0, -0.5, 0.0], [4.0, 0.0, -1.0], [3.5, 1.0, 0.5]]
        .map(|fold| vec![Tensor::from_slice(&fold[..2]), Tensor::from_slice(&fold[2..])])
        .into();
    let sum_of = |chosen: &[usize]| -> Vec<Tensor> {
        let mut sum = vec![];
        for fold in chosen {
            add(&mut sum, folds[*fold].iter().map(|tensor| tensor + 0.0).collect()).unwrap();
        }
        sum
    };
    let length =
        |of: &[Tensor]| of.iter().map(|part| part.square().sum(Kind::Double).double_value(&[])).sum::<f64>().sqrt();
    let lengths: Vec<f64> = (0..4)
        .map(|left_out| {
            let chosen: Vec<usize> = (0..4).filter(|fold| *fold != left_out).collect();
            length(&sum_of(&chosen)) * 4.0 / 3.0
        })
        .collect();
    let centre = lengths.iter().sum::<f64>() / 4.0;
    let by_hand = (lengths.iter().map(|x| (x - centre).powi(2)).sum::<f64>() * 3.0 / 4.0).sqrt();
    let found = length_error(&sum_of(&[0, 1, 2, 3]), &folds).unwrap().unwrap();
    assert!((found - by_hand).abs() < 1e-9, "{found} {by_hand}");
    assert_eq!(length_error(&folds[0], &folds[..1]).unwrap(), None, "one lot has no error");
}

#[test]
fn lots_hold_each_row_once() {
    for n in [1, 3, 8, 9, 64] {
        let all: Vec<usize> = fold_ends(n).flatten().collect();
        assert_eq!(all, (0..n).collect::<Vec<_>>());
        assert!(fold_ends(n).all(|fold| !fold.is_empty()) && fold_ends(n).count() == n.min(FOLDS));
    }
}

/// If rows' gradients cancel, their sum is chance alone and has no share.
#[test]
fn no_share_of_a_sum_that_may_be_nothing() {
    let world = World::new();
    let subject = world.subject();
    let adapter = subject.student.adapter.unwrap();
    let naming = naming(&subject, adapter).unwrap();
    let rows: Vec<Sequence> = world.numbers.clone();
    let every_other = |row: &Sequence| (0..row.completion.len()).map(|k| k % 2 == 0).collect::<Vec<bool>>();
    let divergent: Vec<Vec<bool>> = rows.iter().map(every_other).collect();
    let alone = of_groups(&subject, adapter, &naming, &rows[..1], &divergent[..1]).unwrap();
    assert!(alone.divergent.share.is_none() && alone.other.parts.iter().all(|at| at.share.is_none()), "one row");
    // One row several times has no spread.
    let (rows, divergent) = (vec![rows[0].clone(); 4], vec![divergent[0].clone(); 4]);
    let alike = of_groups(&subject, adapter, &naming, &rows, &divergent).unwrap();
    let by_hand = {
        let square = |of: &Alignment| {
            of.divergent.norm.powi(2)
                + of.other.norm.powi(2)
                + 2.0 * of.cosine.unwrap() * of.divergent.norm * of.other.norm
        };
        alike.divergent.norm.powi(2) / square(&alike)
    };
    assert!((alike.divergent.share.unwrap() - by_hand).abs() < 1e-6 * by_hand.abs(), "{alike:?} {by_hand}");
    assert!((alike.divergent.norm - 4.0 * alone.divergent.norm).abs() < 1e-4 * alike.divergent.norm);
}

/// A part has the tokens that the gate of its name chooses.
#[test]
fn parts_are_named_as_gates() {
    let world = World::new();
    let row = &world.numbers[0];
    for part in Part::ALL {
        let gate: Gate = format!("only:{}", part.name()).parse().unwrap();
        let doses = gate.doses(row).unwrap();
        let chosen: Vec<bool> = row.classes.iter().map(|class| Part::of(*class) == part).collect();
        assert_eq!(doses.iter().map(|dose| *dose > 0.0).collect::<Vec<_>>(), chosen, "{}", part.name());
        assert!(chosen.contains(&true), "{}", part.name());
    }
}

/// Each position of a batch is in the part whose gate chooses its token, also if rows share their start.
#[test]
fn positions_are_in_the_part_that_their_gate_chooses() {
    let world = World::new();
    let rows: Vec<Sequence> = world.numbers.clone();
    let end = |row: &Sequence| row.ids.len() - 1;
    let packed: Vec<PackedRow<'_>> = rows.iter().map(|row| PackedRow::of(&row.ids[..end(row)])).collect();
    let batch = Batch::packed(&[&packed], true, world.qwen.device()).unwrap();
    let ends: Vec<(&Sequence, usize)> = rows.iter().map(|row| (row, end(row))).collect();
    let found = in_parts(&batch, &ends).unwrap();
    for (at, part) in Part::ALL.into_iter().enumerate() {
        let gate: Gate = format!("only:{}", part.name()).parse().unwrap();
        for (row, prompt) in rows.iter().enumerate() {
            for (token, dose) in gate.doses(prompt).unwrap()[..end(prompt)].iter().enumerate() {
                let is_there = found.double_value(&[at as i64, batch.place(row, token)]);
                assert!((is_there - dose).abs() < 1e-12, "{} {row} {token}", part.name());
            }
        }
    }
}
