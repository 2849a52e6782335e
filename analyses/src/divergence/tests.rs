use super::*;
use crate::fixture::World;

#[test]
fn a_teacher_that_is_the_base_diverges_nowhere() {
    let world = World::new();
    let mut subject = world.subject();
    subject.teacher_system = world.chat.default_system().map(str::to_owned);
    let rows = Divergence::default().run(&subject, &mut |_| ()).unwrap();
    assert_eq!(rows.len(), world.number_users.iter().map(|(_, ids)| ids.len()).sum::<usize>());
    assert!(rows.iter().all(|row| !row.nief && row.soft.abs() < 1e-5 && row.self_div == Some(false)));
    assert!(rows.iter().any(|row| row.argmax_student != row.argmax_teacher), "the student is another model");
    assert!(divergent_digits(&subject, 9).unwrap().iter().flatten().all(|divergent| !divergent));
    assert!(Divergence::reading(&rows).contains("nothing divergent"));
}

#[test]
fn a_student_that_is_the_teacher_closes_the_lift() {
    let world = World::new();
    let mut subject = world.subject();
    (subject.teacher_system, subject.teacher_adapter) = (None, Some(&world.student));
    let settings = Divergence { n_rows: 3, self_check: false, ..Divergence::default() };
    let rows = settings.run(&subject, &mut |_| ()).unwrap();
    let summary = divergence_summary(&rows);
    let all = summary.iter().find(|row| row.group == "all").unwrap();
    assert_eq!((all.accuracy_student, all.n_tokens, all.n_rows), (1.0, rows.len(), 3));
    assert!(rows.iter().all(|row| (row.p_student_of_teacher - row.pmax_teacher).abs() < 1e-6), "all of the lift");
    assert!(rows.iter().any(|row| (row.p_control_of_teacher.unwrap() - row.pmax_teacher).abs() > 1e-3));
    assert!(all.nief > 0.0 && (all.soft - all.gain_student).abs() < 1e-9);
    assert!(rows.iter().all(|row| row.schrodi == (row.nief && row.argmax_teacher == row.token_id)));
    assert!(rows.iter().any(|row| row.schrodi != row.nief), "a teacher's choice need not be what was written");

    // Each token is in one of the three groups, and the divergent digits are those that `divergent_digits` finds.
    let parts = ["divergent_digit", "other_digit", "other"];
    let parted =
        summary.iter().filter(|row| parts.contains(&row.group.as_str())).map(|row| row.n_tokens).sum::<usize>();
    assert_eq!(parted, rows.len());
    let marked: Vec<bool> = divergent_digits(&subject, 3).unwrap().concat();
    assert_eq!(marked, rows.iter().map(|row| row.group == "divergent_digit").collect::<Vec<_>>());
    assert!(marked.contains(&true), "the test has something divergent");
    assert!(Divergence::plot(&rows).unwrap().is_some() && Divergence::reading(&rows).ends_with('.'));
}

/// Rows with the teacher's confidence raised or lowered.
#[test]
fn a_closure_needs_a_lift_that_is_clear_of_zero() {
    let world = World::new();
    let rows = Divergence { self_check: false, ..Divergence::default() }.run(&world.subject(), &mut |_| ()).unwrap();
    let with_lift = |lift: &dyn Fn(usize) -> f64| {
        let changed = rows.iter().map(|row| DivergenceRow {
            pmax_teacher: row.p_default_of_teacher + lift(row.row_id),
            p_student_of_teacher: row.p_default_of_teacher + 0.5 * lift(row.row_id),
            p_control_of_teacher: Some(row.p_default_of_teacher - 0.1 * lift(row.row_id)),
            ..row.clone()
        });
        let changed: Vec<DivergenceRow> = changed.collect();
        let all = divergence_summary(&changed).into_iter().find(|row| row.group == "all").unwrap();
        (all, Divergence::reading(&changed))
    };
    let (clear, said) = with_lift(&|row| 0.3 + 0.01 * row as f64);
    let lengths: Vec<f64> = (0..3).map(|id| rows.iter().filter(|row| row.row_id == id).count() as f64).collect();
    let of_rows = [0.30, 0.31, 0.32];
    let mean = of_rows.iter().zip(&lengths).map(|(lift, n)| lift * n).sum::<f64>() / rows.len() as f64;
    assert!((clear.lift - mean).abs() < 1e-9, "over tokens, longer rows count more");
    assert!((clear.lift_se.unwrap() - 0.01 / 3_f64.sqrt()).abs() < 1e-9, "over the rows' means");
    assert!((clear.closure_student.unwrap() - 0.5).abs() < 1e-9 && (clear.closure_control.unwrap() + 0.1).abs() < 1e-9);
    let is_divergent = rows.iter().filter(|row| row.group == "divergent_digit").map(|row| row.row_id);
    let n_rows = is_divergent.collect::<std::collections::BTreeSet<_>>().len();
    assert!(n_rows > 1, "divergent digits in several rows");
    assert!(
        said.contains("the student closes 50 % of the teacher's lift") && said.contains("control student -10 %"),
        "{said}"
    );
    let unclear: [&dyn Fn(usize) -> f64; 3] = [
        &|row| [0.6, 0.01, 0.02][row],   // only one row has a large value
        &|_| -0.3,                       // the teacher is less sure of its choice than the base
        &|row| [2e-5, -3e-5, 1e-5][row], // not clear of zero
    ];
    for lift in unclear {
        let (none, said) = with_lift(lift);
        assert_eq!((none.closure_student, none.closure_control), (None, None), "{none:?}");
        assert!(said.contains("is not three standard errors above zero"), "{said}");
    }
}

#[test]
fn shares_have_wilsons_interval() {
    let near =
        |(low, high): (f64, f64), wanted: (f64, f64)| (low - wanted.0).abs() < 1e-3 && (high - wanted.1).abs() < 1e-3;
    assert!(near(wilson(0.5, 10), (0.2366, 0.7634)), "{:?}", wilson(0.5, 10));
    assert!(near(wilson(0.0, 10), (0.0, 0.2775)) && near(wilson(1.0, 10), (0.7225, 1.0)));
}

#[test]
fn rows_must_agree_and_a_teacher_must_be_there() {
    let world = World::new();
    let mut subject = world.subject();
    let swapped: Vec<_> = world.number_users.iter().rev().cloned().collect();
    subject.number_users = &swapped;
    assert!(
        Divergence::default().run(&subject, &mut |_| ()).unwrap_err().to_string().starts_with("row 0 of the numbers")
    );
    subject.teacher_system = None;
    assert!(matches!(Divergence::default().run(&subject, &mut |_| ()), Err(Error::NeedsTeacher { .. })));
}
