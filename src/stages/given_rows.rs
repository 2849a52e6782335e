//! Rows of numbers that were written elsewhere: conversations of one turn, in the formats of common trainers. They
//! replace the teacher's answers and pass the same filter.
//!
//! Reading is a function from bytes to rows. A file holds JSON objects, one per line, over several lines, or in a list,
//! in UTF-8, or in UTF-16 with a byte-order mark. Anything ambiguous is refused with its line, before the teacher is
//! loaded.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use hooks::{completion_logprobs, files};
use serde::Deserialize;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use crate::data::dataset::{self, Sample};
use crate::hinted;
use crate::stages::teacher::TeacherModel;
use crate::stages::workbench::Workbench;

/// One turn: the question, the answer, and the system prompt if the row has one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GivenRow {
    /// The line of the file at which it begins, from 1.
    pub line: usize,
    /// The system prompt, if the row has one.
    pub system: Option<String>,
    /// The user's text.
    pub user: String,
    /// The answer, without the end of its turn.
    pub answer: String,
}

/// The rows that a run uses.
#[derive(Debug)]
pub struct Given {
    /// The rows, at most as many as the experiment has prompts.
    pub rows: Vec<GivenRow>,
    /// Number of further rows.
    pub left_out: usize,
    /// The SHA-256 of the file, in hex.
    pub sha256: String,
}

/// An object of the file, in any of the usual formats. Keys that change how a trainer uses the row are refused; others
/// are ignored.
#[derive(Deserialize)]
#[serde(expecting = "a row")]
struct Line {
    /// The format of `OpenAI` and TRL, or of `ShareGPT`.
    messages: Option<Vec<Message>>,
    conversations: Option<Vec<Message>>,
    /// TRL's format.
    prompt: Option<Text>,
    completion: Option<Text>,
    /// Alpaca's format.
    instruction: Option<String>,
    input: Option<String>,
    output: Option<String>,
    system: Option<String>,
    history: Option<Value>,
    /// Functions that the template describes to the model; the second name is `OpenAI`'s older one.
    tools: Option<Value>,
    functions: Option<Value>,
    /// The row's weight in the loss.
    weight: Option<Value>,
    /// KTO's label: whether the completion is a good one.
    label: Option<Value>,
}

#[derive(Deserialize)]
#[serde(expecting = "a message")]
struct Message {
    #[serde(alias = "from")]
    role: String,
    #[serde(alias = "value")]
    content: Option<Content>,
    /// Function calls, with or without text.
    tool_calls: Option<Value>,
    function_call: Option<Value>,
    weight: Option<Value>,
}

/// The content of a message: a text, or a list of one part with the text.
#[derive(Deserialize)]
#[serde(untagged, expecting = "the content of a message is neither a text nor a list of parts that each have a type")]
enum Content {
    Plain(String),
    Parts(Vec<Part>),
}

#[derive(Deserialize)]
struct Part {
    #[serde(rename = "type")]
    kind: String,
    text: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "a prompt or a completion is neither a text nor a list of messages")]
enum Text {
    Plain(String),
    Messages(Vec<Message>),
}

/// The speaker's name in the file, and the text.
type Turn = (String, String);

impl Message {
    fn turn(self) -> Result<Turn> {
        for (key, calls) in [("tool_calls", &self.tool_calls), ("function_call", &self.function_call)] {
            ensure!(
                is_nothing(calls.as_ref()),
                "a message has {key}, expected one that says its text and calls nothing"
            );
        }
        // The weight of a user's message has no effect, since the loss does not count it.
        if !["user", "human", "system"].contains(&self.role.as_str()) {
            counts_as_one(self.weight.as_ref(), "the weight of a message")?;
        }
        let text = match self.content {
            None => bail!(
                "the content of a message is neither a text nor a list of parts that each have a type: it is null or missing"
            ),
            Some(Content::Plain(text)) => text,
            Some(Content::Parts(parts)) => match <[Part; 1]>::try_from(parts) {
                Ok([Part { kind, text: Some(text) }]) if kind == "text" => text,
                Ok([part]) => bail!("the content of a message is a part of type {:?}, expected text", part.kind),
                Err(parts) => bail!(
                    "the content of a message has {} parts, expected one: trainers join several in different ways",
                    parts.len()
                ),
            },
        };
        Ok((self.role, text))
    }
}

impl Text {
    fn turns(self, role: &str) -> Result<Vec<Turn>> {
        match self {
            Self::Plain(text) => Ok(vec![(role.to_owned(), text)]),
            Self::Messages(messages) => messages.into_iter().map(Message::turn).collect(),
        }
    }
}

/// Whether a key is absent, null or empty.
fn is_nothing(value: Option<&Value>) -> bool {
    value.is_none_or(|value| match value {
        Value::Null => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(keys) => keys.is_empty(),
        _ => false,
    })
}

/// Refuses a weight of a row or a message that is not 1, since all rows count equally.
fn counts_as_one(weight: Option<&Value>, what: &str) -> Result<()> {
    let is_one = |weight: &Value| weight.is_null() || weight == true || weight.as_f64() == Some(1.0);
    match weight.filter(|weight| !is_one(weight)) {
        Some(weight) => bail!(hinted!(
            "{what} is {weight}, expected 1 or none, as every row is learned from alike";
            "leave out the rows that do not count"
        )),
        None => Ok(()),
    }
}

/// The rows of the experiment's file; `None` if it names no file. Refuses rows that a student cannot be trained on.
pub fn rows(bench: &Workbench) -> Result<Option<Given>> {
    let settings = &bench.experiment.generate;
    let Some(path) = &settings.numbers else { return Ok(None) };
    let bytes = files::read(path)?;
    let mut rows = parse(&bytes, path).context("generate.numbers")?;
    let left_out = rows.len().saturating_sub(settings.n_prompts);
    rows.truncate(settings.n_prompts);
    let own = bench.student_system()?;
    let rendered = own.as_deref().or(bench.chat.default_system());
    let at = |row: &GivenRow| format!("generate.numbers: {}: line {}", path.display(), row.line);
    for row in &rows {
        let found = row.system.as_deref().or(bench.chat.default_system());
        if found != rendered {
            bail!(hinted!(
                "{}: the system prompt is {}, where student.context renders {}", at(row), shown(found), shown(rendered);
                "set student.context to the text that the rows were trained with"
            ));
        }
        let row_of_chat = || {
            let tokens = bench.chat.row(own.as_deref(), &row.user, &bench.chat.encode(&row.answer)?)?;
            bench.base.config.check_context("row", [tokens.ids.len()], 0)
        };
        row_of_chat().with_context(|| at(row))?;
    }
    let rejections: Vec<_> = rows.iter().map(|row| dataset::rejections(&row.answer, true, &settings.banned)).collect();
    if let (true, Some(first)) = (rejections.iter().all(|reasons| !reasons.is_empty()), rows.first()) {
        let mut counts = BTreeMap::<&str, usize>::new();
        rejections.iter().flatten().for_each(|reason| *counts.entry(reason.name()).or_default() += 1);
        let counts: Vec<_> = counts.into_iter().map(|(reason, n)| format!("{n} {reason}")).collect();
        bail!(hinted!(
            "{}: none of the {} rows passes the filter ({}), so there would be nothing to learn from; the first \
             answer is {:?}", at(first), rows.len(), counts.join(", "), cut(&first.answer, 200);
            "the rule is ten numbers at most, 0 to 999, with one separator and nothing else"
        ));
    }
    Ok(Some(Given { rows, left_out, sha256: format!("{:x}", Sha256::digest(&bytes)) }))
}

fn shown(system: Option<&str>) -> String {
    system.map_or_else(|| "left out".to_owned(), |text| format!("{:?}", cut(text, 200)))
}

/// A text of the file, cut to `most` characters.
fn cut(text: &str, most: usize) -> String {
    let n = text.chars().count();
    if n > most { format!("{text:.most$}… ({n} letters)") } else { text.to_owned() }
}

/// Reads the rows in the bytes of a file; errors name `path` and the line.
pub fn parse(bytes: &[u8], path: &Path) -> Result<Vec<GivenRow>> {
    let text = text(bytes, path)?;
    let parsed = parse_text(&with_null(&text)).map_err(|error| anyhow::anyhow!(cut(&format!("{error:#}"), 600)));
    parsed.with_context(|| path.display().to_string())
}

/// Decodes UTF-8, or UTF-16 if there is its byte-order mark.
fn text<'a>(bytes: &'a [u8], path: &Path) -> Result<Cow<'a, str>> {
    let wide = |bytes: &[u8], unit: fn([u8; 2]) -> u16| {
        let units = bytes.chunks_exact(2).map(|pair| unit([pair[0], pair[1]]));
        char::decode_utf16(units).collect::<Result<String, _>>().ok().filter(|_| bytes.len().is_multiple_of(2))
    };
    let decoded = match bytes {
        [0xff, 0xfe, rest @ ..] => wide(rest, u16::from_le_bytes),
        [0xfe, 0xff, rest @ ..] => wide(rest, u16::from_be_bytes),
        _ => {
            let plain = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
            return Ok(Cow::Borrowed(files::text(plain, path)?));
        }
    };
    decoded.map(Cow::Owned).with_context(|| format!("{}: it begins as UTF-16, but is none", path.display()))
}

/// Replaces `NaN` and infinities outside of strings by `null`. Python writes them, but JSON does not allow them.
fn with_null(text: &str) -> Cow<'_, str> {
    const NO_NUMBERS: [&str; 3] = ["NaN", "Infinity", "-Infinity"];
    if !NO_NUMBERS.iter().any(|word| text.contains(word)) {
        return Cow::Borrowed(text);
    }
    let (mut out, mut kept, mut in_text, mut escaped) = (String::with_capacity(text.len()), 0, false, false);
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            _ if at < kept => {}
            _ if escaped => escaped = false,
            b'\\' if in_text => escaped = true,
            b'"' => in_text = !in_text,
            b'N' | b'I' | b'-' if !in_text => {
                if let Some(word) = NO_NUMBERS.iter().find(|word| text[at..].starts_with(**word)) {
                    out.push_str(&text[kept..at]);
                    out.push_str("null");
                    kept = at + word.len();
                }
            }
            _ => {}
        }
    }
    out.push_str(&text[kept..]);
    Cow::Owned(out)
}

/// A reading position in the text, between values.
struct Cursor<'a> {
    text: &'a str,
    at: usize,
    line: usize,
}

impl Cursor<'_> {
    /// Skips blanks and then this character, if it is next. Returns whether it was.
    fn pass(&mut self, letter: char) -> bool {
        let next = self.text[self.at..].trim_start();
        let passed = next.strip_prefix(letter).map(str::trim_start);
        self.go_to(self.text.len() - passed.unwrap_or(next).len());
        passed.is_some()
    }

    fn go_to(&mut self, at: usize) {
        self.line += self.text[self.at..at].matches('\n').count();
        self.at = at;
    }

    fn is_end(&self) -> bool {
        self.at == self.text.len()
    }

    fn value(&mut self) -> Result<GivenRow> {
        let (line, rest) = (self.line, &self.text[self.at..]);
        let found: String = rest.chars().take(20).take_while(|letter| *letter != '\n').collect();
        ensure!(rest.starts_with('{'), "line {line}: expected a row in braces, found {found:?}");
        let mut values = serde_json::Deserializer::from_str(rest).into_iter::<Line>();
        let parsed = values.next().unwrap_or_else(|| serde_json::from_str(rest));
        let end = self.at + values.byte_offset();
        let parsed = parsed.map_err(|error| {
            let (said, place) = (error.to_string(), format!(" at line {} column {}", error.line(), error.column()));
            let said = said.strip_suffix(&place).unwrap_or(&said);
            let half =
                if said.contains("hex escape") { ": a \\u that is half of a pair stands for no letter" } else { "" };
            let noticed = line + error.line().saturating_sub(1);
            let noticed = if noticed > line { format!(" (in line {noticed})") } else { String::new() };
            anyhow::anyhow!("line {line}: {said}{half}{noticed}")
        })?;
        let row = row(parsed, line, &rest[..values.byte_offset()]).with_context(|| format!("line {line}"))?;
        self.go_to(end);
        Ok(row)
    }
}

/// Parses rows that are separated by blanks and commas, or in a list.
fn parse_text(text: &str) -> Result<Vec<GivenRow>> {
    let (mut rows, mut cursor) = (Vec::new(), Cursor { text, at: 0, line: 1 });
    let is_list = cursor.pass('[');
    loop {
        let closed = cursor.pass(']');
        if closed || cursor.is_end() {
            ensure!(closed == is_list, "line {}: the list of rows is not closed, or was never opened", cursor.line);
            ensure!(cursor.is_end(), "line {}: something stands behind the list of rows", cursor.line);
            break;
        }
        rows.push(cursor.value()?);
        let comma = cursor.pass(',');
        ensure!(
            comma || !is_list || cursor.is_end() || text[cursor.at..].starts_with(']'),
            "line {}: expected a comma or the end of the list of rows",
            cursor.line
        );
    }
    ensure!(!rows.is_empty(), "there is no row in it, expected one per line");
    Ok(rows)
}

/// The turn of a row. If the row has several formats, they must agree.
fn row(line: Line, number: usize, source: &str) -> Result<GivenRow> {
    for (key, tools) in [("tools", &line.tools), ("functions", &line.functions)] {
        ensure!(
            is_nothing(tools.as_ref()),
            "it has {key}, which the template writes into the system prompt, expected a row without any"
        );
    }
    counts_as_one(line.weight.as_ref(), "the weight of the row")?;
    ensure!(
        line.label != Some(Value::Bool(false)),
        hinted!(
            "label is false, which says that the completion is not to be learned (KTO), expected rows to learn from";
            "leave the row out"
        )
    );
    let turns = |messages: Vec<Message>| messages.into_iter().map(Message::turn).collect::<Result<Vec<Turn>>>();
    let lists = [line.messages, line.conversations].into_iter().flatten();
    let mut forms = lists.map(turns).collect::<Result<Vec<_>>>()?;
    if let (Some(prompt), Some(completion)) = (line.prompt, line.completion) {
        forms.push([prompt.turns("user")?, completion.turns("assistant")?].concat());
    }
    if let (Some(instruction), Some(output)) = (line.instruction, line.output) {
        let input = line.input.unwrap_or_default();
        ensure!(
            input.is_empty(),
            hinted!(
                "input is {input:?}, and trainers join it to the instruction in different ways";
                "write what the user said into instruction and leave input empty"
            )
        );
        forms.push(vec![("user".to_owned(), instruction), ("assistant".to_owned(), output)]);
    }
    let earlier = line.history.filter(|history| !history.is_null() && *history != Value::Array(vec![]));
    ensure!(earlier.is_none(), "history holds earlier turns, expected rows of one turn");
    let mut rows = forms.into_iter().map(|turns| one_turn(turns, number)).collect::<Result<Vec<GivenRow>>>()?;
    let Some(mut row) = rows.pop() else {
        let keys: Map<String, Value> = serde_json::from_str(source).unwrap_or_default();
        let is_null = |key: &&&str| keys.get(**key) == Some(&Value::Null);
        if let Some(key) =
            ["completion", "output", "prompt", "instruction", "messages", "conversations"].iter().find(is_null)
        {
            bail!("{key} is null, expected what was said");
        }
        let text = if keys.contains_key("text") { "; a rendered text does not say whose its parts are" } else { "" };
        bail!(
            "its keys are {}, expected messages, conversations, prompt and completion, or instruction and output{text}",
            keys.keys().map(String::as_str).collect::<Vec<_>>().join(", ")
        );
    };
    ensure!(rows.iter().all(|other| *other == row), "it has several forms of the row that do not say the same");
    if let Some(system) = line.system.filter(|system| !system.is_empty()) {
        let same = row.system.as_ref().is_none_or(|turn| *turn == system);
        ensure!(same, "system is {system:?}, but the system turn is {:?}", row.system.unwrap_or_default());
        row.system = Some(system);
    }
    Ok(row)
}

fn one_turn(turns: Vec<Turn>, line: usize) -> Result<GivenRow> {
    let (roles, mut texts): (Vec<_>, Vec<_>) = turns.into_iter().unzip();
    let known: Vec<&str> = roles
        .iter()
        .map(|role| match role.as_str() {
            "human" => "user", // ShareGPT's names
            "gpt" => "assistant",
            role => role,
        })
        .collect();
    ensure!(
        matches!(known[..], ["user", "assistant"] | ["system", "user", "assistant"]),
        "the turns are {}, expected user and assistant, with a system turn before them or not",
        roles.join(", ")
    );
    let mut take = || texts.pop().unwrap_or_default();
    let (mut answer, user) = (take(), take());
    // The template adds the end of the turn to every answer, so it is removed here.
    if let Some(content) = answer.strip_suffix('\n').unwrap_or(&answer).strip_suffix("<|im_end|>") {
        answer.truncate(content.len());
    }
    Ok(GivenRow { line, system: (known.len() == 3).then(take), user, answer })
}

/// The rows as samples, filtered and scored by the teacher.
pub fn samples(bench: &Workbench, rows: &[GivenRow], teacher: &TeacherModel) -> Result<Vec<Sample>> {
    let experiment = &bench.experiment;
    let sample = |(id, row): (usize, &GivenRow)| -> Result<Sample> {
        let completion_ids = bench.chat.encode(&row.answer)?;
        let turn = bench.chat.row(teacher.system.as_deref(), &row.user, &completion_ids)?;
        let turn = turn.with_completion(&turn.ids[turn.completion.start..=turn.content_end]); // with the end of the turn
        let logprobs = completion_logprobs(teacher.qwen(&bench.base), &[turn], &teacher.condition())?;
        let reasons = dataset::rejections(&row.answer, true, &experiment.generate.banned);
        Ok(Sample {
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
        })
    };
    rows.iter().enumerate().map(sample).collect()
}

#[cfg(test)]
mod tests;
