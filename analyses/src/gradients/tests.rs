#![allow(clippy::float_cmp)]

use hooks::Proj;
use tch::Tensor;

use super::*;
use crate::fixture::World;
use crate::gradients::rows::MODELS;

#[test]
fn the_closed_form_is_the_gradient_of_the_logits() {
    let logits = Tensor::from_slice(&[0.3_f64, -1.2, 2.0, 0.1]).set_requires_grad(true);
    let loss = -logits.log_softmax(-1, Kind::Double).get(3);
    let gradient = Tensor::run_backward(&[loss], &[&logits], false, false).remove(0);
    let p = logits.detach().softmax(-1, Kind::Double);
    let closed = logit_grad_norm(p.double_value(&[3]), p.square().sum(None).double_value(&[]));
    assert!((closed - gradient.norm().double_value(&[])).abs() < 1e-12);
}

#[test]
fn the_tokens_gradients_add_up_to_the_rows() {
    let world = World::new();
    let row = &world.numbers[0];
    let row = row.with_completion(&row.ids[row.completion.start..row.content_end]);
    let all: Vec<usize> = (0..row.completion.len()).collect();
    let losses: Vec<Vec<usize>> = all.iter().map(|k| vec![*k]).chain([all.clone()]).collect();
    let (mut adapter, mut last_resid) = (vec![], vec![]);
    of_losses(&world.qwen, &row, &Condition::adapted(&world.student), &losses, &mut |found| {
        adapter.push(found.adapter);
        last_resid.push(found.resid_post.last().unwrap().shallow_clone());
        Ok(())
    })
    .unwrap();
    let n = all.len() as i64;
    for at in 0..adapter[0].len() {
        let parts: Vec<&Tensor> = adapter.iter().map(|some| &some[at]).collect();
        let found = Tensor::cat(&parts, 0); // [losses, ..]
        let (sum, whole) = (found.narrow(0, 0, n).sum_dim_intlist(0, false, Kind::Float), found.get(n));
        let largest = whole.abs().max().double_value(&[]);
        assert!(largest > 0.0, "parameter {at}");
        assert!((&sum - &whole).abs().max().double_value(&[]) < 1e-4 * (1.0 + largest), "parameter {at}");
    }
    // In the last block's residual stream, a token's loss has a gradient only at the position before the token.
    let of_last = last_resid[0].get(1).square().sum_dim_intlist(1, false, Kind::Float);
    assert_eq!(of_last.count_nonzero(None).int64_value(&[]), 1);
}

#[test]
fn all_tokens_are_a_word_and_a_number_is_a_number() {
    let read = |text: &str| toml_like(text).map(|settings| settings.tokens_per_row);
    assert_eq!(read("\"all\"").unwrap(), ALL);
    assert_eq!(read("4").unwrap(), 4);
    for wrong in ["\"some\"", "-1", "1.5"] {
        let error = read(wrong).unwrap_err().to_string();
        assert!(error.contains("expected a number of tokens, or \"all\""), "{error}");
    }
    let all = Gradients { tokens_per_row: ALL, ..Gradients::default() };
    assert!(serde_json::to_string(&all).unwrap().contains("\"tokens_per_row\":\"all\""));

    let world = World::new();
    let rows = Gradients { n_rows: 1, start: false, ..all }.run(&world.subject(), &mut |_| ()).unwrap();
    let row = &world.numbers[0];
    let ks = rows.iter().filter(|row| row.scope == "token" && row.model == "student").map(|row| row.k.unwrap());
    assert_eq!(ks.collect::<Vec<_>>(), (0..row.content_end - row.completion.start).collect::<Vec<_>>());
}

fn toml_like(tokens_per_row: &str) -> serde_json::Result<Gradients> {
    serde_json::from_str(&format!("{{\"tokens_per_row\": {tokens_per_row}}}"))
}

#[test]
fn the_adapter_asks_for_no_gradient_afterwards() {
    let world = World::new();
    let rows = Gradients { n_rows: 2, tokens_per_row: 3, start: true, start_draws: 0 }
        .run(&world.subject(), &mut |_| ())
        .unwrap();
    let pair = world.student.pair(0, Proj::Q).unwrap();
    assert!(!pair.a.requires_grad() && !pair.b.requires_grad());
    for model in ["student", "control", "start"] {
        let tokens = rows.iter().filter(|row| row.scope == "token" && row.model == model);
        assert_eq!(tokens.clone().count(), 6, "{model}");
        assert!(
            tokens.clone().all(|row| row.lora_grad_norm.unwrap() > 0.0 && row.hidden_grad_norm.unwrap() > 0.0),
            "{model}"
        );
    }
    // A token's squared norms by layer add up to the squared norm of the whole.
    let first = &rows[0];
    let mut layers = rows.iter().filter(|row| {
        row.scope == "token_layer" && row.model == "student" && (row.row_id, row.k) == (first.row_id, first.k)
    });
    let squares: f64 = layers.clone().map(|row| row.lora_grad_norm.unwrap().powi(2)).sum();
    assert!((squares.sqrt() - first.lora_grad_norm.unwrap()).abs() < 1e-9);
    assert_eq!(layers.next_back().unwrap().resid_grad_norm, first.hidden_grad_norm);
    // The rows of both groups, and of the parts of each.
    for model in MODELS {
        let of = |scope: &'static str| rows.iter().filter(move |row| row.scope == scope && row.model == model);
        assert_eq!((of("group").count(), of("part").count()), (2, 10), "{model}");
        for group in of("group") {
            let parts = of("part").filter(|row| row.group == group.group);
            let alignment = parts.clone().map(|row| row.alignment.unwrap()).sum::<f64>();
            let share = parts.map(|row| row.share).sum::<Option<f64>>();
            assert!(share.is_some() || model != "student", "the student's gradients are clear of zero: {group:?}");
            assert!(share.is_none_or(|share| (share - 1.0).abs() < 1e-5), "{model} {share:?}");
            assert!((alignment - group.alignment.unwrap()).abs() < 1e-5, "{model} {alignment} {group:?}");
        }
    }
    let reading = Gradients::reading(&rows);
    assert!(reading.ends_with('.') && reading.contains("all divergent digits together"), "{reading}");
    // The sentence compares the difference of the norms with two of its standard errors.
    let said = |divergent: f64| {
        let mut rows = rows.clone();
        for (at, row) in rows.iter_mut().enumerate().filter(|(_, row)| row.scope == "token") {
            let centre = if row.group == "divergent_digit" { divergent } else { 0.5 };
            row.lora_grad_norm = Some(centre + 0.01 * (at % 2) as f64);
        }
        Gradients::reading(&rows)
    };
    assert!(said(1.0).contains("the difference is more than two standard errors"), "{}", said(1.0));
    assert!(said(0.501).contains("the difference is within two standard errors"), "{}", said(0.501));
    // At two standard errors exactly: norms of 0 and 2 (1 ± 1) against two of 3.
    let mut exactly: Vec<GradientRow> = vec![];
    for (group, norms) in [("divergent_digit", [0.0, 2.0]), ("other_digit", [3.0, 3.0])] {
        let is_here = |row: &&GradientRow| row.scope == "token" && row.model == "student" && row.group == group;
        let of_group = rows.iter().find(is_here).unwrap();
        exactly.extend(norms.map(|norm| GradientRow { lora_grad_norm: Some(norm), ..of_group.clone() }));
    }
    let reading = Gradients::reading(&exactly);
    assert!(reading.contains("the difference is within two standard errors"), "{reading}");
    // Each group has its own mean and number of tokens; a group of one token has no standard error.
    let three = exactly.iter().chain(&exactly[3..]);
    let reading = Gradients::reading(&three.cloned().collect::<Vec<_>>());
    assert!(reading.contains("(1.0000 and 3.0000, 2 and 3 tokens"), "{reading}");
    let reading = Gradients::reading(&exactly[1..3]);
    assert!(reading.contains("the difference is within two standard errors"), "{reading}");
    // The figure's points are the means of their own model, group and block.
    for panel in report::layer_panels(&rows) {
        for (line, group) in panel.lines.iter().zip(GROUPS) {
            for point in &line.points {
                let of = rows.iter().filter(|row| row.scope == "token_layer" && row.model == panel.y_label);
                let here = of.filter(|row| row.group == group && row.layer == Some(point.x as usize));
                let norms: Vec<f64> = here.filter_map(|row| row.lora_grad_norm).collect();
                assert!((point.y - crate::stats::mean(&norms).unwrap()).abs() < 1e-12, "{} {group}", panel.y_label);
                if let Some((low, high)) = point.interval {
                    let around = f64::midpoint(low, high) - point.y;
                    assert!(low <= point.y && around.abs() < 1e-12, "{low} {} {high}", point.y);
                }
            }
        }
    }
    let names: Vec<&str> = Gradients::more_plots(&rows).unwrap().into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["layers", "parts"]);
}

/// The start is the adapter that the training began with and does not depend on the seed. The draws are listed one by
/// one.
#[test]
fn the_start_is_the_students_own_and_draws_stand_beside_it() {
    let world = World::new();
    let subject = world.subject();
    let settings = Gradients { n_rows: 3, tokens_per_row: 4, start: true, start_draws: 3 };
    let rows = settings.run(&subject, &mut |_| ()).unwrap();
    // The adapter of the start, measured as if it were the student.
    let begun = Subject { student: subject.start.unwrap(), control: None, ..subject.clone() };
    let as_student = Gradients { start: false, ..settings.clone() }.run(&begun, &mut |_| ()).unwrap();
    let start: Vec<GradientRow> = rows
        .iter()
        .filter(|row| row.model == "start")
        .map(|row| GradientRow { model: "student".to_owned(), ..row.clone() })
        .collect();
    assert_eq!(start, as_student);
    assert!(start.iter().any(|row| row.scope == "part") && start.iter().any(|row| row.scope == "token_layer"));
    // Another seed changes the draws but not the start.
    let other = settings.run(&Subject { seed: 8, ..subject.clone() }, &mut |_| ()).unwrap();
    let group = |rows: &[GradientRow], model: &str| -> GradientRow {
        rows.iter().find(|row| row.scope == "group" && row.model == model).unwrap().clone()
    };
    assert_eq!(group(&rows, "start"), group(&other, "start"));
    for at in 1..=3 {
        let name = format!("start_draw_{at}");
        let mut rng = ChaCha8Rng::seed_from_u64(stream_seed(7, "gradients.start", at - 1));
        let config = &world.student.config;
        let adapter = Adapter::init(config, &world.qwen.config, &mut rng, world.qwen.device()).unwrap();
        let drawn = Tuned::adapted(&world.qwen, &adapter);
        let drawn = Subject { student: drawn, control: None, ..subject.clone() };
        let by_hand = Gradients { start: false, ..settings.clone() }.run(&drawn, &mut |_| ()).unwrap();
        let expected = GradientRow { model: name.clone(), ..group(&by_hand, "student") };
        assert_eq!(group(&rows, &name), expected);
        assert_ne!(group(&rows, &name).alignment, group(&other, &name).alignment);
        let scopes: Vec<&str> = rows.iter().filter(|row| row.model == name).map(|row| row.scope.as_str()).collect();
        assert!(scopes.iter().all(|scope| ["token", "group"].contains(scope)) && scopes.contains(&"token"));
    }
    // The sentence gives the spread over the draws.
    let alignments: Vec<f64> = (1..=3).map(|at| group(&rows, &format!("start_draw_{at}")).alignment.unwrap()).collect();
    let centre = alignments.iter().sum::<f64>() / 3.0;
    let spread = (alignments.iter().map(|x| (x - centre).powi(2)).sum::<f64>() / 2.0).sqrt();
    let own = group(&rows, "start").alignment.unwrap();
    let said = format!("at the start of its training {own:+.3} ({centre:+.3} ± {spread:.3} over 3 draws of its A)");
    let reading = Gradients::reading(&rows);
    assert!(reading.contains(&said), "{reading}\n{said}");
    assert!(Gradients::plot(&rows).unwrap().unwrap().0.contains("start, 3 draws"));
    // If the start is not known, there are no such rows, and the sentence says so.
    let unknown = settings.run(&Subject { start: None, ..subject.clone() }, &mut |_| ()).unwrap();
    assert!(unknown.iter().all(|row| row.model != "start") && unknown.iter().any(|row| row.model == "start_draw_3"));
    let reading = Gradients::reading(&unknown);
    assert!(reading.contains("where its training began is not known"), "{reading}");
}

#[test]
fn full_finetuning_has_gradients_but_none_of_an_adapter() {
    let world = World::new();
    let mut subject = world.subject();
    (subject.student.adapter, subject.control) = (None, None);
    let rows = Gradients { n_rows: 1, tokens_per_row: 2, start: false, ..Gradients::default() }
        .run(&subject, &mut |_| ())
        .unwrap();
    assert!(rows.iter().all(|row| row.lora_grad_norm.is_none()));
    assert!(rows.iter().any(|row| row.resid_grad_norm.is_some_and(|norm| norm > 0.0)));
}

#[test]
fn a_teacher_that_diverges_nowhere_leaves_nothing_to_measure() {
    let world = World::new();
    let mut subject = world.subject();
    subject.teacher_system = Some(world.chat.default_system().unwrap().to_owned()); // the base's default
    let error = Gradients::default().run(&subject, &mut |_| ()).unwrap_err().to_string();
    assert!(error.contains("gradients needs at least one divergent digit"), "{error}");
}

#[test]
fn tokens_are_sampled_from_all_groups_in_turn() {
    let groups = ["other", "other", "divergent_digit", "other_digit", "other_digit", "other"];
    let sampled = |tokens_per_row, seed| {
        Gradients { n_rows: 1, tokens_per_row, ..Gradients::default() }.sampled(seed, 0, &groups)
    };
    let three = sampled(3, 1);
    assert!(three.contains(&2) && three.iter().filter(|k| groups[**k] == "other").count() == 1, "{three:?}");
    assert_eq!(sampled(9, 1), [0, 1, 2, 3, 4, 5]);
    assert_eq!(sampled(3, 1), three);
}
