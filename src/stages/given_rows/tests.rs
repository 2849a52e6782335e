use super::*;

fn rows(bytes: &[u8]) -> Result<Vec<GivenRow>> {
    parse(bytes, Path::new("rows.jsonl"))
}

fn refused(text: &str) -> String {
    format!("{:#}", rows(text.as_bytes()).unwrap_err())
}

#[test]
fn the_usual_forms_are_one_row() {
    let plain = GivenRow { line: 2, system: None, user: "Go on: 1, 2".to_owned(), answer: "3, 4".to_owned() };
    let user = r#"{"role": "user", "content": "Go on: 1, 2"}"#;
    let assistant = r#"{"role": "assistant", "content": "3, 4", "weight": 1, "tool_calls": null}"#;
    let system = r#"{"role": "system", "content": "You count."}"#;
    let parts = r#"{"role": "assistant", "content": [{"type": "text", "text": "3, 4"}]}"#;
    for line in [
        format!("{{\"messages\": [{user}, {assistant}], \"id\": 7}}"),
        format!("{{\"prompt\": [{user}], \"completion\": [{assistant}]}}"),
        format!("{{\"messages\": [{user}, {parts}]}}"),
        format!("{{\"conversations\": [{user}, {assistant}]}}"),
        format!("{{\"messages\": [{user}, {assistant}], \"prompt\": \"Go on: 1, 2\", \"completion\": \"3, 4\"}}"),
        r#"{"prompt": "Go on: 1, 2", "completion": "3, 4"}"#.to_owned(),
        r#"{"messages": null, "prompt": "Go on: 1, 2", "completion": "3, 4"}"#.to_owned(),
        r#"{"conversations": [{"from": "human", "value": "Go on: 1, 2"}, {"from": "gpt", "value": "3, 4"}], "system": ""}"#
            .to_owned(),
        r#"{"instruction": "Go on: 1, 2", "input": "", "output": "3, 4", "history": []}"#.to_owned(),
    ] {
        assert_eq!(rows(format!("\n{line}\n").as_bytes()).unwrap(), std::slice::from_ref(&plain), "{line}");
    }
    // Keys whose values change nothing are accepted.
    for more in ["\"tools\": []", "\"tools\": null", "\"label\": true", "\"weight\": 1.0", "\"label\": \"number\""] {
        let line = format!("\n{{\"messages\": [{}, {assistant}], {more}}}", user.replace('}', ", \"weight\": 0}"));
        assert_eq!(rows(line.as_bytes()).unwrap(), std::slice::from_ref(&plain), "{line}");
    }
    let with = GivenRow { line: 1, system: Some("You count.".to_owned()), ..plain };
    for line in [
        format!("{{\"messages\": [{system}, {user}, {assistant}]}}"),
        format!("{{\"prompt\": [{system}, {user}], \"completion\": [{assistant}]}}"),
        r#"{"system": "You count.", "instruction": "Go on: 1, 2", "output": "3, 4"}"#.to_owned(),
    ] {
        assert_eq!(rows(line.as_bytes()).unwrap(), std::slice::from_ref(&with), "{line}");
    }
}

#[test]
fn lines_lists_and_objects_over_several_lines_are_the_same_rows() {
    let one = r#"{"prompt": "Go on: 4,  8", "completion": "12, 16"}"#;
    let two = "{\n \"prompt\": \"More\",\r\n \"completion\": \"[1, 2]\"\n}";
    for (text, second) in [
        (format!("{one}\n{two}\n"), 2),
        (format!("{one}{two}"), 1),
        (format!("{one},\r\n{two},\n"), 2),
        (format!("[{one}, {two}]\n"), 1),
        (format!("\n [\n{one},\n\n{two},\n]"), 5),
    ] {
        let found = rows(text.as_bytes()).unwrap();
        let first = if text.starts_with('\n') { 3 } else { 1 };
        assert_eq!(found.iter().map(|row| row.line).collect::<Vec<_>>(), [first, second], "{text}");
        assert_eq!([&*found[0].user, &*found[1].user], ["Go on: 4,  8", "More"], "{text}");
        assert_eq!([&*found[0].answer, &*found[1].answer], ["12, 16", "[1, 2]"], "{text}");
        let wide = |unit: fn(u16) -> [u8; 2]| "\u{feff}".encode_utf16().chain(text.encode_utf16()).flat_map(unit);
        for bytes in [
            ["\u{feff}", &text].concat().into_bytes(),
            wide(u16::to_le_bytes).collect(),
            wide(u16::to_be_bytes).collect(),
        ] {
            assert_eq!(rows(&bytes).unwrap(), found, "{text}");
        }
    }
    for (text, expected) in [
        (format!("[{one}"), "line 1: the list of rows is not closed"),
        (format!("{one}\n]"), "line 2: the list of rows is not closed, or was never opened"),
        (format!("[{one}]\n{one}"), "line 2: something stands behind the list"),
        (format!("[{one}\n{one}]"), "line 2: expected a comma or the end of the list"),
        (format!("{one},,\n{one}"), "line 1: expected a row in braces, found \",\""),
        (format!("{one}\n{{\"data\": [{one}]}}"), "line 2: its keys are data, expected messages"),
        ("\u{feff}[ ]".to_owned(), "there is no row in it"),
        ("\n".to_owned(), "there is no row in it"),
    ] {
        assert!(refused(&text).contains(expected), "{text}: {}", refused(&text));
    }
    let half = [b"\xff\xfe".as_slice(), b"{\0\""].concat();
    assert!(rows(&half).unwrap_err().to_string().contains("begins as UTF-16, but is none"));
    assert!(format!("{:#}", rows(b"PAR1\xc3\x28").unwrap_err()).contains("expected UTF-8 text"));
}

#[test]
fn what_python_writes_and_nobody_reads_is_passed_over() {
    let line = r#"{"logprob": NaN, "s": [-Infinity, Infinity], "prompt": "NaN \"-Infinity\\", "completion": "1, 2"}"#;
    let found = rows(line.as_bytes()).unwrap();
    assert_eq!((found[0].user.as_str(), found[0].answer.as_str()), ("NaN \"-Infinity\\", "1, 2"));
}

#[test]
fn one_end_of_the_turn_is_the_template_s() {
    let answer = |written: &str| {
        let line = serde_json::json!({"prompt": "a", "completion": written}).to_string();
        rows(line.as_bytes()).unwrap().remove(0).answer
    };
    assert_eq!(answer("1, 2<|im_end|>"), "1, 2");
    assert_eq!(answer("1, 2<|im_end|>\n"), "1, 2");
    assert_eq!(answer("1, 2<|im_end|><|im_end|>"), "1, 2<|im_end|>");
    for kept in ["1, 2\n", "1, 2<|endoftext|>", " 1, 2"] {
        assert_eq!(answer(kept), kept);
    }
}

#[test]
fn another_form_is_refused_with_its_line() {
    let good = r#"{"prompt": "a", "completion": "b"}"#;
    let message = |content: &str| {
        format!(
            r#"{{"messages": [{{"role": "user", "content": "a"}}, {{"role": "assistant", "content": {content}}}]}}"#
        )
    };
    for (line, expected) in [
        (r#"{"text": "1, 2"}"#.to_owned(), "line 3: its keys are text, expected messages, conversations, prompt and"),
        (r#"{"question": "a", "response": "1"}"#.to_owned(), "its keys are question, response, expected"),
        (r#"{"prompt": "a"}"#.to_owned(), "line 3: its keys are prompt, expected"),
        (r#"{"prompt": "a", "completion": null}"#.to_owned(), "line 3: completion is null, expected what was said"),
        (r#"{"instruction": null, "output": "1"}"#.to_owned(), "line 3: instruction is null, expected what was said"),
        (
            r#"{"prompt": "a", "completion": "1", "tools": [{"type": "function"}]}"#.to_owned(),
            "line 3: it has tools, which the template writes into the system prompt, expected a row without any",
        ),
        (r#"{"prompt": "a", "completion": "1", "weight": 0}"#.to_owned(), "line 3: the weight of the row is 0, expected 1"),
        (r#"{"prompt": "a", "completion": "1", "weight": 0.5}"#.to_owned(), "line 3: the weight of the row is 0.5, expected"),
        (
            r#"{"prompt": "a", "completion": "1", "label": false}"#.to_owned(),
            "line 3: label is false, which says that the completion is not to be learned (KTO)",
        ),
        (
            r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "1", "weight": 0}]}"#.to_owned(),
            "line 3: the weight of a message is 0, expected 1 or none",
        ),
        (
            r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": null, "tool_calls": [{"id": "x"}]}]}"#
                .to_owned(),
            "line 3: a message has tool_calls, expected one that says its text",
        ),
        (r#"{"messages": [{"role": "user"}]}"#.to_owned(), "it is null or missing"),
        (r#"{"messages": []}"#.to_owned(), "line 3: the turns are , expected user and assistant"),
        (r#"{"messages": [{"role": "user", "content": "a"}]}"#.to_owned(), "the turns are user, expected"),
        (
            r#"{"messages": [{"role": "developer", "content": "a"}, {"role": "user", "content": "a"}]}"#.to_owned(),
            "the turns are developer, user, expected",
        ),
        (message("null"), "line 3: the content of a message is neither a text nor a list of parts"),
        (message(r#"[{"type": "image_url"}]"#), "line 3: the content of a message is a part of type \"image_url\""),
        (message(r#"[{"type": "text", "text": "1"}, {"type": "text", "text": "2"}]"#), "has 2 parts, expected one"),
        (r#"{"prompt": "a", "completion": [1, 2]}"#.to_owned(), "line 3: a prompt or a completion is neither a text nor"),
        (r#"{"prompt": "a", "prompt": "b", "completion": "1"}"#.to_owned(), "line 3: duplicate field `prompt`"),
        (r#"{"prompt": "a \ud83d", "completion": "1"}"#.to_owned(), "line 3: unexpected end of hex escape: a \\u that is half"),
        (r#"{"instruction": "a", "input": "b", "output": "1"}"#.to_owned(), "line 3: input is \"b\", and trainers join it"),
        (
            r#"{"instruction": "a", "output": "1", "history": [["x", "y"]]}"#.to_owned(),
            "line 3: history holds earlier turns",
        ),
        (
            r#"{"prompt": "a", "completion": "1", "instruction": "a", "output": "2"}"#.to_owned(),
            "line 3: it has several forms of the row that do not say the same",
        ),
        (
            r#"{"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "1"}], "system": "y"}"#
                .to_owned(),
            "line 3: system is \"y\", but the system turn is \"x\"",
        ),
        ("1, 2".to_owned(), "line 3: expected a row in braces, found \"1, 2\""),
        ("{\n\n \"prompt\": a}".to_owned(), "line 3: expected value (in line 5)"),
        ("{\"prompt\": \"a\",\n{\"prompt\": \"a\", \"completion\": \"1\"}".to_owned(), "line 3: key must be a string (in line 4)"),
        (message(&format!(r#"[{{"type": "{}"}}]"#, "x".repeat(9000))), "letters)"),
    ] {
        let message = refused(&format!("{good}\n\n{line}"));
        assert!(message.starts_with("rows.jsonl: line ") && message.contains(expected), "{line}: {message}");
        assert!(message.len() < 800, "{}", message.len());
    }
}
