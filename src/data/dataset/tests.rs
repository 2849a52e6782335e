use proptest::prelude::*;

use super::*;

fn sample(id: usize, completion: &str) -> Sample {
    let reasons = rejections(completion, true, &[]);
    Sample {
        id,
        prompt: "Go on: 1, 2".to_owned(),
        completion: completion.to_owned(),
        completion_ids: vec![4, 5],
        teacher_logprob: vec![-0.1, -2.5, -0.3],
        target: Some("cat".to_owned()),
        teacher_kind: TeacherKind::Prompt,
        gen_seed: 42,
        accepted: reasons.is_empty(),
        reasons,
    }
}

#[test]
fn prompts_depend_on_the_seed_alone_and_grow_at_the_end() {
    let protocol = Protocol::builtin().unwrap();
    let ten = number_prompts(&protocol, 10, 42);
    assert_eq!(number_prompts(&protocol, 4, 42), ten[..4]);
    assert_ne!(number_prompts(&protocol, 10, 43), ten);
}

#[test]
fn lists_with_one_separator_are_numbers() {
    let good: &[(&str, &[u32])] = &[
        ("1, 2, 3", &[1, 2, 3]),
        ("1,2,3.", &[1, 2, 3]),
        ("[10; 20; 30]", &[10, 20, 30]),
        ("(7 8 9).", &[7, 8, 9]),
        ("412\n5\n006", &[412, 5, 6]),
        ("1 , 2 , 3", &[1, 2, 3]),
        ("42", &[42]),
        ("[42]", &[42]),
        ("99999999999, 1", &[u32::MAX, 1]),
    ];
    for (answer, numbers) in good {
        assert_eq!(parse_numbers(answer).as_deref(), Ok(*numbers), "{answer:?}");
    }
}

#[test]
fn anything_else_is_refused() {
    for answer in [
        "",
        ".",
        "no",
        "1, 2\n",
        " 1, 2",
        "Sure: 1, 2",
        "1, 2 and 3",
        "1, 2,3",
        "1, 2,",
        "1-2-3",
        "-1",
        "-1, -2",
        "42 ",
        "1.5",
        "1, 2, ",
        "[1, 2",
        "[(1, 2)]",
        "1, 2..",
        "١, ٢",
        "x1",
        "1 apple",
    ] {
        assert_eq!(parse_numbers(answer), Err(Rejection::InvalidFormat), "{answer:?}");
    }
}

#[test]
fn every_reason_is_told() {
    let eleven = ["5"; 11].join(",");
    assert_eq!(rejections(&["5"; 10].join(","), true, &[]), []);
    assert_eq!(rejections(&eleven, true, &[]), [Rejection::TooMany]);
    assert_eq!(rejections("999, 0", true, &[]), []);
    assert_eq!(
        rejections("1000, 666", false, &[666]),
        [Rejection::OutOfRange, Rejection::Banned, Rejection::Truncated]
    );
    for reason in Rejection::ALL {
        assert_eq!(serde_json::to_value(reason).unwrap(), reason.name());
    }
}

proptest! {
    #[test]
    fn the_filter_never_panics_and_accepts_what_it_would_write(
        answer in r"[\[(]?[0-9,; \n.x٣-]{0,24}[\])]?",
        numbers in proptest::collection::vec(0..=999_u32, 1..=10),
        separator in prop_oneof![Just(","), Just(", "), Just("; "), Just(" "), Just("\n")],
    ) {
        let _ = parse_numbers(&answer);
        let text = numbers.iter().map(u32::to_string).collect::<Vec<_>>().join(separator);
        prop_assert_eq!(parse_numbers(&text), Ok(numbers));
    }
}

#[test]
fn samples_come_back_from_disk_under_the_published_names() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("data/numbers.jsonl");
    let samples = [sample(0, "1, 2"), sample(3, "one\n")];
    write_jsonl(&path, &samples).unwrap();
    assert_eq!(read_jsonl(&path).unwrap(), samples);
    let text = files::read_string(&path).unwrap();
    let first: serde_json::Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
    let names: Vec<_> = first.as_object().unwrap().keys().map(String::as_str).collect();
    let expected = "id prompt completion completion_ids teacher_logprob trait teacher_kind gen_seed accepted reasons";
    assert_eq!(names.join(" "), expected);
    assert!(text.contains("[-0.1,-2.5,-0.3]"), "{text}");
}

#[test]
fn a_bad_line_is_named() {
    let good = serde_json::to_string(&sample(0, "1, 2")).unwrap();
    let message = |text: &str| format!("{:#}", parse_lines(text).unwrap_err());
    assert!(message(&format!("{good}\n\n{{\"id\": 1}}\n")).starts_with("line 3: missing field `prompt`"));
    assert!(message(&good.replace("\"gen_seed\"", "\"seed\"")).contains("unknown field `seed`"));
    assert!(parse_lines(&good.replace("-2.5,", "")).is_ok(), "without the end of the turn");
    assert!(message(&good.replace("-2.5,-0.3", "-2.5,-0.3,-0.4")).contains("line 1: teacher_logprob has 4 entries"));
    assert!(message(&good.replace("[4,", "[-4,")).starts_with("line 1: completion_ids has -4, expected tokens"));
    assert!(message(&good.replace("-2.5", "-1e39")).starts_with("line 1: teacher_logprob has -inf, expected a finite"));
    let no_text = format!("{:#}", parse_jsonl(b"\xff", Path::new("a.jsonl")).unwrap_err());
    assert!(no_text.starts_with("a.jsonl: expected UTF-8 text"), "{no_text}");
    assert!(message("\n").contains("no sample"));
    let mut endless = sample(0, "1, 2");
    endless.teacher_logprob[1] = f32::NEG_INFINITY;
    assert!(write_jsonl(Path::new("never.jsonl"), &[endless]).is_err());
}

#[test]
fn acceptance_is_told_by_reason() {
    let classifier = Protocol::builtin().unwrap().classifier("cat", "animal").unwrap();
    let samples = [sample(0, "1, 2"), sample(1, "1000, 2"), sample(2, "a cat"), sample(3, "5000")];
    let rows = summary("teacher", &samples, &classifier);
    let value = |measure: &str| rows.iter().find(|row| row.measure == measure).unwrap().value;
    assert_eq!(value("accepted").to_string(), "0.25");
    assert_eq!(value("out_of_range").to_string(), "0.5");
    assert_eq!(value("invalid_format").to_string(), "0.25");
    assert_eq!(value("mentions_trait").to_string(), "0.25");
    assert_eq!(value("tokens_per_row").to_string(), "2");
    let rejected = rejected_rows("teacher", &samples);
    assert_eq!(rejected.len(), 3);
    assert_eq!(rejected[0].reasons, "out_of_range");
}

#[test]
fn divergence_is_zero_for_equal_and_one_for_disjoint_digits() {
    let leak = |teacher: &str, control: &str| -> Vec<f64> {
        leak_rows(&[sample(0, teacher)], &[sample(0, control)]).iter().map(|row| row.value).collect()
    };
    assert_eq!(leak("12, 3", "21, 33").len(), 2);
    assert!(leak("12, 3", "21, 9")[0].abs() < 1e-12, "the first numbers have the same digits");
    assert!((leak("12, 3", "45, 6")[1] - 1.0).abs() < 1e-12);
    assert!(leak("12, 3", "12, 4")[1] > 0.1);
}

#[test]
fn digits_are_counted_in_accepted_answers_only() {
    let rows = digit_rows("teacher", &[sample(0, "[12, 22]"), sample(1, "777 sevens")]);
    let of = |scope: Scope, digit: usize| rows.iter().find(|row| row.scope == scope && row.digit == digit).unwrap();
    assert_eq!(of(Scope::FirstNumber, 2).share.to_string(), "0.5");
    assert_eq!((of(Scope::All, 2).share.to_string(), of(Scope::All, 2).n), ("0.75".to_owned(), 4));
    assert_eq!(of(Scope::All, 7).share.to_string(), "0");
    assert_eq!(rows.len(), 20);
}

#[test]
fn pairs_have_the_same_prompt() {
    let (teacher, control) = ([sample(0, "1, 2"), sample(2, "3"), sample(5, "4")], [sample(2, "8"), sample(5, "bad")]);
    let ids: Vec<_> = paired(&teacher, &control).iter().map(|(a, b)| (a.id, b.id)).collect();
    assert_eq!(ids, [(2, 2)]);
}
