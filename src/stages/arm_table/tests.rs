use super::*;

fn row(arm: &str, rank: Option<i64>, seed_index: usize, delta_margin: f64) -> ArmRow {
    ArmRow {
        arm: arm.to_owned(),
        data: Some(ArmData::Teacher),
        teacher_kind: Some(TeacherKind::Finetuned),
        rank,
        alpha: rank.map(|rank| rank as f64),
        seed_index,
        model: "tiny-random".to_owned(),
        dtype: Dtype::F32,
        method: if rank.is_some() { Method::Lora } else { Method::Full },
        optimizer: Some(OptimizerKind::AdamW),
        learning_rate: Some(1e-2),
        loss: Some(Loss::Nll),
        select: Some("all".to_owned()),
        n_rows: Some(6),
        n_steps: Some(3),
        loss_first: Some(2.0),
        loss_last: Some(1.5),
        delta_w_norm: 0.5 + rank.unwrap_or_default() as f64,
        target: "cat".to_owned(),
        n_questions: 2,
        logp_target: -3.0,
        p_target_exact: 0.05,
        delta_logp: delta_margin / 2.0,
        delta_logp_se: Some(0.1),
        margin: 0.5,
        delta_margin,
        delta_margin_se: None,
    }
}

fn rows() -> Vec<ArmRow> {
    let shuffled = ArmRow { data: Some(ArmData::Shuffled), ..row("shuffled completions", Some(8), 0, 0.01) };
    vec![
        row(STUDENT, Some(8), 0, 1.2),
        ArmRow {
            data: Some(ArmData::Control),
            teacher_kind: Some(TeacherKind::Control),
            ..row(CONTROL_STUDENT, Some(8), 0, 0.05)
        },
        row("alpha = rank", Some(16), 0, 0.4),
        row("alpha = rank", Some(1), 0, 0.3),
        row("alpha = rank", Some(4), 0, 0.9),
        row("full finetuning", None, 0, 0.7),
        shuffled,
    ]
}

#[test]
fn an_inverted_u_is_told_from_a_rise_where_ranks_have_several_students() {
    let arm = |of: &dyn Fn(f64) -> f64, seeds: usize| -> Vec<ArmRow> {
        let mut rows = vec![row(STUDENT, Some(8), 0, 0.4)];
        for (doublings, rank) in [1_i64, 2, 4, 8, 16, 32, 64].into_iter().enumerate() {
            for seed in 0..seeds {
                let noise = 0.02 * ((doublings * 3 + seed * 2) as f64).sin();
                rows.push(row("ranks", Some(rank), seed, of(doublings as f64) + noise));
            }
        }
        rows
    };
    let hill = |x: f64| 1.0 - (x - 3.0).abs() / 3.0;
    let said = reading(&arm(&hill, 5));
    assert!(said.contains("up to rank 8 +0.33"), "{said}");
    assert!(said.contains("from it on -0.33"), "{said}");
    assert!(said.contains(": an inverted U by the two-lines test"), "{said}");
    let said = reading(&arm(&|x| x / 6.0, 5));
    assert!(said.contains("from it on no line: no inverted U by"), "{said}");
    let said = reading(&arm(&hill, 4));
    assert!(said.contains("\"ranks\" has 4 students at some ranks, too few"), "{said}");
    assert!(!said.contains("two-lines") && !said.contains("highest"), "{said}");
}

#[test]
fn ranks_are_lines_and_the_rest_are_bars() {
    let rows = rows();
    let (ranked, single) = parted(&rows);
    assert_eq!(ranked.len(), 1);
    assert_eq!(ranked[0].1.iter().map(|group| group.rank).collect::<Vec<_>>(), [Some(1), Some(4), Some(16)]);
    assert_eq!(single.iter().map(|group| group.arm).collect::<Vec<_>>(), ["full finetuning", "shuffled completions"]);
    let (over_rank, by_arm) = (rank_plot(&rows).unwrap().unwrap(), plot(&rows).unwrap().unwrap());
    assert!(over_rank.0.contains("alpha = rank") && !over_rank.0.contains("full finetuning"));
    assert!(by_arm.0.contains("full finetuning") && by_arm.0.contains("control student"));
    let mut rows = rows;
    for (loudness, said) in [(0.0, false), (3.0, false), (9.0, true)] {
        rows.push(ArmRow { teacher_kind: Some(TeacherKind::Planted), ..row("planted", Some(8), 0, loudness) });
        let drawn = plot(&rows).unwrap().unwrap().0;
        assert!(drawn.contains("planted") && drawn.contains("beyond the") == said, "{loudness}: {drawn}");
        rows.pop();
    }
    assert_eq!(rank_plot(&rows[..2]).unwrap(), None);
    assert_eq!(plot(&rows[..5]).unwrap(), None);
}

#[test]
fn the_reading_names_the_control_and_how_few_students_there_are() {
    let found = reading(&rows());
    for part in [
        "changed by +1.200 nats, the control student's by +0.050",
        "\"alpha = rank\" has one student at some ranks, too few to say how the effect goes with the rank",
        "\"full finetuning\": +0.700",
        "\"shuffled completions\", shuffled completions: +0.010",
        "Every number is that of one student",
        "not those of the arms",
    ] {
        assert!(found.contains(part), "{part}: {found}");
    }
    assert!(!found.contains("another model"), "{found}");
    let mut rows = rows();
    rows.push(ArmRow { model: "other".to_owned(), ..row("other model", Some(8), 0, 0.0) });
    rows.push(ArmRow {
        teacher_kind: Some(TeacherKind::Planted),
        data: Some(ArmData::Own),
        ..row("planted", Some(8), 0, 3.0)
    });
    let found = reading(&rows);
    assert!(found.contains("compared with that model itself") && found.contains("positive control"), "{found}");
}

#[test]
fn the_detection_limit_is_told_beside_the_control_student() {
    assert_eq!(detection_limit(&rows()), None, "nothing was planted");
    let with = |effects: &[(&str, f64)]| {
        let planted = |(arm, effect): &(&str, f64)| ArmRow {
            data: Some(ArmData::Planted),
            delta_margin_se: Some(0.1),
            ..row(arm, Some(8), 0, *effect)
        };
        let mut rows = rows();
        rows[1].delta_margin_se = Some(0.0);
        rows.extend(effects.iter().map(planted));
        detection_limit(&rows).unwrap()
    };
    let both = with(&[("planted 0.5 %", 0.3), ("planted 1 %", 0.4)]);
    assert!(both.contains("\"planted 1 %\" by +0.350 differ clearly, \"planted 0.5 %\" by +0.250 do not"), "{both}");
    assert!(with(&[("planted 1 %", 0.1)]).contains("so that a null says nothing"));
    assert!(with(&[("planted 1 %", 0.9)]).contains("by +0.850 differ clearly ("));
    assert!(reading(&rows()).contains("luck of a seed") && !reading(&rows()).contains("could have seen"));
}

#[test]
fn several_students_have_a_mean_and_an_error_over_students() {
    let mut rows = rows();
    rows.truncate(2);
    rows.extend([row("x", Some(2), 0, 0.1), row("x", Some(2), 1, 0.3)]);
    let found = groups(&rows);
    assert!((found[2].mean(effect) - 0.2).abs() < 1e-12);
    let (low, high) = found[2].interval(effect).unwrap();
    assert!((low - 0.1).abs() < 1e-12 && (high - 0.3).abs() < 1e-12, "{low} {high}");
    assert_eq!(found[0].interval(effect), None, "one student has no error");
    let said = reading(&rows);
    assert!(said.contains("\"x\": +0.200 ± 0.100 over 2 students"), "{said}");
    assert!(said.contains("over students that differ in their seeds"), "{said}");
    assert!(plot(&rows).unwrap().unwrap().0.contains("standard error"));
}

#[test]
fn without_a_control_the_reading_says_so() {
    let mut rows = rows();
    rows.remove(1);
    assert!(reading(&rows).contains("there is no control student"));
}
