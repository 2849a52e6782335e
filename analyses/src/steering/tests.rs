#![allow(clippy::float_cmp)]

use super::*;
use crate::direction::directions;
use crate::fixture::World;

#[test]
fn the_controls_have_the_learned_vectors_length() {
    let world = World::new();
    let random = random_vector(&world.subject(), 1, 0, 2.5).unwrap();
    assert!((length(&random).unwrap() - 2.5).abs() < 1e-5);
    for (layer, at) in [(0, 0), (1, 1), (0, 1)] {
        let other = random_vector(&world.subject(), layer, at, 1.0).unwrap();
        let cosine = crate::direction::geometry::cosine(&random, &other).unwrap();
        assert!(cosine.abs() < 0.6, "layers and draws have random vectors of their own");
    }
    assert_eq!(length(&with_length(&Tensor::from_slice(&[0_f32, 0.0]), 1.0).unwrap()).unwrap(), 0.0);
}

#[test]
fn an_edit_acts_with_its_coefficient() {
    let world = World::new();
    let settings = Steering {
        layers: vec![0],
        coefficients: vec![0.0, 2.0],
        n_prompts: 2,
        n_random: 3,
        n_questions: Some(2),
        ..Steering::default()
    };
    let rows = settings.run(&world.subject(), &mut |_| ()).unwrap();
    assert!(rows.iter().all(|row| row.n_questions == 2));
    let kinds: Vec<&str> = rows.iter().map(|row| row.kind.as_str()).collect();
    let added = ["learned", "learned", "random", "random", "control_student", "control_student"];
    assert_eq!(kinds, [&added[..], &["project_out", "project_out_random", "project_out_base"]].concat());
    for row in &rows {
        let unchanged = row.coefficient == Some(0.0);
        assert_eq!(row.delta_logp.abs() < 1e-6, unchanged, "{row:?}");
    }
    assert!(rows[6].delta_logp != rows[6].student_delta_logp);
    assert!(Steering::reading(&rows).contains("3 random vectors"), "{}", Steering::reading(&rows));
    let none = Steering { n_random: 0, ..settings.clone() }.run(&world.subject(), &mut |_| ()).unwrap();
    assert!(none.iter().all(|row| !row.kind.contains("random") && row.n_random.is_none() && row.rank_logp.is_none()));
    assert_eq!(none.len(), rows.len() - 3);
    assert!(Steering::reading(&none).contains("no random vector stands beside it"));
    let one = Steering { n_random: 1, ..settings.clone() }.run(&world.subject(), &mut |_| ()).unwrap_err().to_string();
    assert!(one.contains("steering.n_random is 1") && one.contains("2 or more"), "{one}");
    assert_eq!(settings.run(&world.subject(), &mut |_| ()).unwrap(), rows);
    let zero: Vec<SteeringRow> = rows.iter().cloned().map(|row| SteeringRow { vector_norm: 0.0, ..row }).collect();
    let said = Steering::reading(&zero);
    assert!(said.starts_with("The learned direction is zero after block 0: nothing was added"), "{said}");
    assert!(Steering::plot(&rows).unwrap().is_some() && Steering::reading(&rows).ends_with('.'));
}

/// Compares mean, spread and the learned direction's rank with edits that are made one at a time.
#[test]
fn random_directions_are_a_mean_a_spread_and_a_place() {
    let world = World::new();
    let subject = world.subject();
    let settings = Steering {
        layers: vec![1],
        coefficients: vec![4.0],
        n_prompts: 2,
        n_random: 5,
        replace: true,
        ..Steering::default()
    };
    let rows = settings.run(&subject, &mut |_| ()).unwrap();
    let learned = directions(&subject, &Direction { positions: vec![Extraction::All], n_prompts: 2 }).unwrap();
    let prompts = subject.question_prompts("test").unwrap();
    let forms = TokenForms::of(subject.target, subject.chat).unwrap();
    let base = forms.scores(subject.base, &prompts, &Condition::default()).unwrap();
    let change = |model: Tuned<'_>, prompt: usize, condition: &Condition<'_>| {
        let found = forms.score(model.qwen, &prompts[prompt], condition).unwrap();
        found.logp_target - base[prompt].logp_target
    };
    let mean = |of: &dyn Fn(usize) -> f64| (0..prompts.len()).map(of).sum::<f64>() / prompts.len() as f64;
    let random =
        |layer: usize, at: usize| random_vector(&subject, layer, at, length(&learned[layer]).unwrap()).unwrap();
    let (student, base_model) = (subject.student, subject.base());
    let with = |model, edit| -> Condition<'_> { edited(model, edit) };
    let replaced = |model, other, at: usize| {
        mean(&|prompt| {
            let theirs = stream(other, &prompts[prompt..=prompt]).unwrap();
            let all: Vec<Tensor> = (0..learned.len()).map(|layer| random(layer, at)).collect();
            let all: Vec<&Tensor> = all.iter().collect();
            change(model, prompt, &along(model, &theirs, &all).unwrap())
        })
    };
    let each: [(&str, &str, f64, Vec<f64>); 4] = [
        (
            "learned",
            "random",
            1.0,
            (0..5)
                .map(|at| {
                    mean(&|prompt| change(base_model, prompt, &with(base_model, Edit::add(1, &random(1, at), 4.0))))
                })
                .collect(),
        ),
        (
            "project_out",
            "project_out_random",
            -1.0,
            (0..5)
                .map(|at| mean(&|prompt| change(student, prompt, &with(student, Edit::project_out(1, &random(1, at))))))
                .collect(),
        ),
        ("replace", "replace_random", -1.0, (0..5).map(|at| replaced(student, base_model, at)).collect()),
        ("transplant", "transplant_random", 1.0, (0..5).map(|at| replaced(base_model, student, at)).collect()),
    ];
    for (kind, kind_random, sign, by_hand) in each {
        let of = |kind: &str| rows.iter().find(|row| row.kind == kind).unwrap();
        let (own, by_chance) = (of(kind), of(kind_random));
        let centre = by_hand.iter().sum::<f64>() / 5.0;
        let spread = (by_hand.iter().map(|x| (x - centre).powi(2)).sum::<f64>() / 4.0).sqrt();
        assert!((by_chance.delta_logp - centre).abs() < 1e-4, "{kind_random}: {by_chance:?} {centre}");
        assert!((by_chance.delta_logp_sd.unwrap() - spread).abs() < 1e-4 && spread > 1e-4, "{kind_random}: {spread}");
        let above = by_hand.iter().filter(|x| sign * **x >= sign * own.delta_logp).count();
        assert_eq!((own.rank_logp, own.n_random), (Some(1 + above), Some(5)), "{kind}");
        assert!(own.delta_logp_sd.is_none() && by_chance.rank_logp.is_none());
    }
}

#[test]
fn the_students_difference_at_the_end_is_the_student() {
    // The question is the number prompt itself: the addition after the last block at its last token is the whole
    // difference.
    let world = World::new();
    let mut subject = world.subject();
    let questions = [world.number_users[0].0.clone()];
    subject.questions = &questions;
    let layer = world.qwen.config.n_layers - 1;
    let settings = Steering {
        layers: vec![layer],
        coefficients: vec![1.0],
        extraction: Extraction::Last,
        n_prompts: 1,
        prompt_only: true,
        ..Steering::default()
    };
    let vector =
        directions(&subject, &Direction { positions: vec![Extraction::Last], n_prompts: 1 }).unwrap().remove(layer);
    let prompt = &subject.question_prompts("test").unwrap()[..1];
    let edit = Edit::add(layer, &vector, 1.0).at_tokens(settings.tokens());
    let next = |model: Tuned<'_>, condition| hooks::next_token_logprobs(model.qwen, prompt, &condition).unwrap();
    let steered = next(subject.base(), edited(subject.base(), edit));
    let student = next(subject.student, subject.student.condition());
    assert!((steered - student).abs().max().double_value(&[]) < 1e-4);
}

#[test]
fn what_moved_along_the_direction_is_undone_and_nothing_else() {
    let world = World::new();
    let subject = world.subject();
    let settings = Steering { layers: vec![0], n_prompts: 2, n_random: 2, replace: true, ..Steering::default() };
    let rows = settings.run(&subject, &mut |_| ()).unwrap();
    let of = |kind: &str| rows.iter().find(|row| row.kind == kind).unwrap();
    let student = of("replace").student_delta_logp;
    assert!(
        (of("replace").delta_logp - student).abs() > 1e-4
            && of("replace").delta_logp != of("replace_random").delta_logp
    );
    // If the direction is the student's whole difference at a prompt's end, removing it leaves the base.
    let question = [world.number_users[0].0.clone()];
    let subject = Subject { questions: &question, ..world.subject() };
    let mut ends = directions(&subject, &Direction { positions: vec![Extraction::Last], n_prompts: 1 }).unwrap();
    let last = ends.len() - 1;
    ends[..last].iter_mut().for_each(|direction| *direction = direction.zeros_like()); // zeros replace nothing
    let prompt = &subject.question_prompts("test").unwrap()[..1];
    let next = |model: Tuned<'_>, condition: &Condition<'_>| {
        hooks::next_token_logprobs(model.qwen, prompt, condition).unwrap()
    };
    let (student, base) = (subject.student, subject.base());
    let plain = |model: Tuned<'_>| next(model, &model.condition());
    let apart = |a: &Tensor, b: &Tensor| (a - b).abs().max().double_value(&[]);
    assert!(apart(&plain(student), &plain(base)) > 1e-3);
    for (model, other) in [(student, base), (base, student)] {
        let along = along(model, &stream(other, prompt).unwrap(), &ends.iter().collect::<Vec<_>>());
        let found = next(model, &along.unwrap());
        assert!(apart(&found, &plain(other)) < 1e-4, "{}", apart(&found, &plain(other)));
    }
}

#[test]
fn layers_are_spread_or_checked() {
    let layers = |settings: &Steering, n| settings.checked(n);
    assert_eq!(layers(&Steering::default(), 24).unwrap(), [6, 12, 18]);
    assert_eq!(layers(&Steering::default(), 2).unwrap(), [0, 1]);
    assert_eq!(layers(&Steering::default(), 1).unwrap(), [0]);
    let message = layers(&Steering { layers: vec![2], ..Steering::default() }, 2).unwrap_err().to_string();
    assert!(message.contains("steering.layers is 2"), "{message}");
}
