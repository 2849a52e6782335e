//! Rows of numbers that were written elsewhere: JSON lines as trainers take them, one conversation of one turn each. They stand
//! in for the teacher's answers, and the filter sorts them as it does those.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use hooks::files;
use hooks::score::completion_logprobs;
use serde::Deserialize;

use crate::dataset::{self, Sample};
use crate::teacher::TeacherModel;
use crate::workbench::Workbench;

/// One turn: what was asked and what was answered, under which system prompt where it is said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// The system prompt, where the row has one.
    pub system: Option<String>,
    /// What the user asks.
    pub user: String,
    /// The answer.
    pub answer: String,
}

/// A line of the file, in any of the usual shapes; other keys of it are passed over.
#[derive(Deserialize)]
struct Line {
    messages: Option<Vec<Message>>,
    prompt: Option<Text>,
    completion: Option<Text>,
}

#[derive(Clone, Deserialize)]
struct Message {
    role: String,
    content: String,
}

/// A plain text, or messages.
#[derive(Deserialize)]
#[serde(untagged)]
enum Text {
    Plain(String),
    Messages(Vec<Message>),
}

impl Text {
    fn messages(self, role: &str) -> Vec<Message> {
        match self {
            Self::Plain(content) => vec![Message { role: role.to_owned(), content }],
            Self::Messages(messages) => messages,
        }
    }
}

/// The rows of the file that the experiment names, as many as it has prompts at most; none where it names no file.
pub fn rows(bench: &Workbench) -> Result<Option<Vec<Row>>> {
    let settings = &bench.experiment.generate;
    let Some(path) = &settings.numbers else { return Ok(None) };
    let mut rows = parse(&files::read(path)?, path).context("generate.numbers")?;
    rows.truncate(settings.n_prompts);
    let own = bench.student_system()?;
    let rendered = own.as_deref().or(bench.chat.default_system());
    for (index, row) in rows.iter().enumerate() {
        let found = row.system.as_deref().or(bench.chat.default_system());
        if found != rendered {
            bail!(
                "{}: row {} has the system prompt {found:?}, where student.context renders {rendered:?}; hint: set \
                 student.context to the text that the rows were trained with",
                at(path),
                index + 1
            );
        }
    }
    Ok(Some(rows))
}

fn at(path: &Path) -> String {
    format!("generate.numbers, {}", path.display())
}

/// The rows in the bytes of a JSON-lines file; an error names the line, and `path`.
pub fn parse(bytes: &[u8], path: &Path) -> Result<Vec<Row>> {
    parse_lines(files::text(bytes, path)?).with_context(|| path.display().to_string())
}

fn parse_lines(text: &str) -> Result<Vec<Row>> {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let rows = lines.map(|(index, line)| row(line).with_context(|| format!("line {}", index + 1)));
    let rows = rows.collect::<Result<Vec<Row>>>()?;
    ensure!(!rows.is_empty(), "there is no row in it, expected one per line");
    Ok(rows)
}

fn row(line: &str) -> Result<Row> {
    let messages = match serde_json::from_str(line)? {
        Line { messages: Some(messages), .. } => messages,
        Line { prompt: Some(prompt), completion: Some(completion), .. } => {
            [prompt.messages("user"), completion.messages("assistant")].concat()
        }
        _ => bail!("there is neither \"messages\" nor \"prompt\" with \"completion\" in it"),
    };
    let (roles, mut texts): (Vec<_>, Vec<_>) =
        messages.into_iter().map(|message| (message.role, message.content)).unzip();
    let roles: Vec<&str> = roles.iter().map(String::as_str).collect();
    ensure!(
        matches!(roles[..], ["user", "assistant"] | ["system", "user", "assistant"]),
        "the turns are {}, expected user and assistant, with a system turn before them or not",
        roles.join(", ")
    );
    let mut take = || texts.pop().unwrap_or_default();
    let (answer, user) = (take(), take());
    Ok(Row { system: (roles.len() == 3).then(take), user, answer })
}

/// The rows as samples, filtered and scored by the teacher.
pub fn samples(bench: &Workbench, rows: &[Row], teacher: &TeacherModel) -> Result<Vec<Sample>> {
    let experiment = &bench.experiment;
    let mut samples = Vec::with_capacity(rows.len());
    for (id, row) in rows.iter().enumerate() {
        let completion_ids = bench.chat.encode(&row.answer)?;
        let turn = bench.chat.row(teacher.system.as_deref(), &row.user, &completion_ids)?;
        let turn = turn.with_completion(&turn.ids[turn.completion.start..=turn.content_end]); // with the end of the turn
        let logprobs = completion_logprobs(teacher.qwen(&bench.base), &[turn], &teacher.condition())?;
        let reasons = dataset::rejections(&row.answer, true, &experiment.generate.banned);
        samples.push(Sample {
            id,
            prompt: row.user.clone(),
            completion: row.answer.clone(),
            completion_ids,
            teacher_logprob: logprobs.into_iter().next().unwrap_or_default(),
            target: Some(experiment.target.word.clone()),
            teacher_kind: teacher.kind,
            gen_seed: experiment.seeds.gen_seed,
            accepted: reasons.is_empty(),
            reasons,
        });
    }
    Ok(samples)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_usual_shapes_are_one_row() {
        let plain = Row { system: None, user: "Go on: 1, 2".to_owned(), answer: "3, 4".to_owned() };
        let user = r#"{"role": "user", "content": "Go on: 1, 2"}"#;
        let assistant = r#"{"role": "assistant", "content": "3, 4"}"#;
        let system = r#"{"role": "system", "content": "You count."}"#;
        for line in [
            format!("{{\"messages\": [{user}, {assistant}], \"id\": 7}}"),
            format!("{{\"prompt\": [{user}], \"completion\": [{assistant}]}}"),
            r#"{"prompt": "Go on: 1, 2", "completion": "3, 4"}"#.to_owned(),
        ] {
            assert_eq!(parse_lines(&format!("\n{line}\n")).unwrap(), std::slice::from_ref(&plain), "{line}");
        }
        let with = Row { system: Some("You count.".to_owned()), ..plain };
        for line in [
            format!("{{\"messages\": [{system}, {user}, {assistant}]}}"),
            format!("{{\"prompt\": [{system}, {user}], \"completion\": [{assistant}]}}"),
        ] {
            assert_eq!(parse_lines(&line).unwrap(), std::slice::from_ref(&with), "{line}");
        }
    }

    #[test]
    fn another_shape_is_refused_with_its_line() {
        let good = r#"{"prompt": "a", "completion": "b"}"#;
        for (line, expected) in [
            (r#"{"text": "1, 2"}"#, "line 3: there is neither \"messages\" nor \"prompt\""),
            (r#"{"prompt": "a"}"#, "line 3: there is neither"),
            (r#"{"messages": []}"#, "line 3: the turns are , expected user and assistant"),
            (r#"{"messages": [{"role": "user", "content": "a"}]}"#, "the turns are user, expected"),
            ("1, 2", "line 3: "),
        ] {
            let message = format!("{:#}", parse_lines(&format!("{good}\n\n{line}")).unwrap_err());
            assert!(message.contains(expected), "{line}: {message}");
        }
        assert!(parse_lines("\n").unwrap_err().to_string().contains("no row"));
    }
}
