//! The weight of each token in a student's loss, as `finetune.tokens` and `finetune.weights` choose it.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use analyses::Tuned;
use analyses::divergence::{Divergence, divergence_tokens};
use anyhow::{Context, Result, ensure};
use hooks::{Sequence, files, stream_seed};
use rand::SeedableRng;
use rand::seq::index::sample;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::data::dataset::TeacherKind;
use crate::hinted;
use crate::output::progress::say;
use crate::output::publish::Table;
use crate::stages::kept_rows::Learned;
use crate::stages::subject_data::SubjectData;
use crate::stages::teacher;
use crate::stages::workbench::Workbench;
use crate::training::settings::{TargetTokens, Weights};

/// Per row and token, the weight of its loss; `None` if all weigh 1. A row is all 0 if nothing is learned from it.
pub(crate) fn of_rows(bench: &Workbench, data: Learned<'_>, rows: &[Sequence]) -> Result<Option<Vec<Vec<f64>>>> {
    let settings = &bench.experiment.finetune;
    let by_class = (settings.tokens != TargetTokens::All).then(|| by_divergence(bench, data, rows)).transpose()?;
    let by_table = settings.weights.as_ref().map(|weights| by_table(weights, data, rows)).transpose()?;
    Ok(match (by_class, by_table) {
        (Some(one), Some(other)) => Some(one.iter().zip(&other).map(|(one, other)| product(one, other)).collect()),
        (one, other) => one.or(other),
    })
}

fn product(one: &[f64], other: &[f64]) -> Vec<f64> {
    one.iter().zip(other).map(|(one, other)| one * other).collect()
}

/// 1 for the tokens that `finetune.tokens` chooses.
fn by_divergence(bench: &Workbench, data: Learned<'_>, rows: &[Sequence]) -> Result<Vec<Vec<f64>>> {
    let tokens = bench.experiment.finetune.tokens;
    let divergent = divergent(bench, data)?;
    let mut rng = ChaCha8Rng::seed_from_u64(stream_seed(bench.experiment.seeds.order_seed, "finetune.tokens", 0));
    let of_row = |(row, divergent): (&Sequence, &Vec<bool>)| {
        let mut weights = vec![0.0; row.ids.len()];
        for at in chosen(row, divergent, tokens, &mut rng) {
            weights[at] = 1.0;
        }
        weights
    };
    Ok(rows.iter().zip(&divergent).map(of_row).collect())
}

/// The chosen positions of a row; none if it has no divergent token, or no other. `divergent`: per token of its answer.
fn chosen(row: &Sequence, divergent: &[bool], tokens: TargetTokens, rng: &mut ChaCha8Rng) -> Vec<usize> {
    // All tokens that the loss could count: the answer and the end of its turn.
    let all: Vec<usize> = row.completion.clone().collect();
    let of = |at: &usize| divergent.get(at - row.completion.start) == Some(&true);
    let (these, others): (Vec<usize>, Vec<usize>) = all.iter().copied().partition(of);
    if these.is_empty() || others.is_empty() {
        return vec![];
    }
    match tokens {
        TargetTokens::Divergent => these,
        TargetTokens::NotDivergent => others,
        TargetTokens::Random => sample(rng, all.len(), these.len()).iter().map(|at| all[at]).collect(),
        TargetTokens::All | TargetTokens::AllOfThose => all,
    }
}

/// Students of a small model are trained side by side, and arms share the run's files: one writes at a time.
static WRITING: Mutex<()> = Mutex::new(());

/// Per sample and token of its answer, whether it is divergent. Read from the run's file, if that is for the same
/// samples in the same context.
fn divergent(bench: &Workbench, data: Learned<'_>) -> Result<Vec<Vec<bool>>> {
    let texts: Vec<_> = data.samples.iter().map(|sample| (&sample.prompt, &sample.completion_ids)).collect();
    let settings = Divergence { n_rows: data.samples.len(), ..bench.experiment.measure.divergence.clone() };
    let student = (bench.student_system()?, bench.experiment.student.template);
    let of = serde_json::to_vec(&(texts, student, bench.files.fingerprint(), bench.experiment.dtype, &settings))?;
    let of = format!("{:x}", Sha256::digest([of, teacher::fingerprint(bench, data.run)?].concat()));
    let is_control = data.samples.first().is_some_and(|sample| sample.teacher_kind == TeacherKind::Control);
    let path = if is_control { data.run.control_divergence_tokens() } else { data.run.divergence_tokens() };
    let _one_at_a_time = WRITING.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(known) = files::read(&path).ok().and_then(|bytes| serde_json::from_slice::<Divergent>(&bytes).ok())
        && known.of == of
    {
        return Ok(known.tokens);
    }
    let scene = SubjectData::of(bench, data.run, data.samples)?;
    let subject = scene.subject(bench, Tuned::of(&bench.base));
    let tokens = divergence_tokens(&subject, data.samples.len(), settings.definition, settings.self_check)
        .context("finetune.tokens")?;
    let found = Divergent { of, tokens };
    files::write_atomic(&path, &serde_json::to_vec(&found)?)?;
    Ok(found.tokens)
}

/// Divergent tokens as they are stored, with a hash of the inputs.
#[derive(Serialize, Deserialize)]
struct Divergent {
    of: String,
    tokens: Vec<Vec<bool>>,
}

/// The weights of a table. If it is of the teacher's rows alone and these are others, they are 1.
fn by_table(weights: &Weights, data: Learned<'_>, rows: &[Sequence]) -> Result<Vec<Vec<f64>>> {
    let kind = data.written.first().map(|sample| sample.teacher_kind);
    let set = if kind == Some(TeacherKind::Control) { "control" } else { "teacher" };
    let lines = lines(weights, &Table::read(&weights.table)?, set)?;
    let Some(lines) = lines.filter(|_| kind != Some(TeacherKind::Planted)) else {
        say(format!(
            "finetune: {} is of the teacher's rows, so these learn from all tokens alike",
            weights.table.display()
        ));
        return Ok(rows.iter().map(|row| vec![1.0; row.ids.len()]).collect());
    };
    let ids = data.written.iter().map(|sample| sample.id);
    let of_rows: Result<Vec<_>> = rows.iter().zip(ids).map(|(row, id)| of_row(row, id, &lines)).collect();
    of_rows.with_context(|| weights.table.display().to_string())
}

/// Refuses a table that is not one of weights, before anything is made.
pub(super) fn check(weights: &Weights) -> Result<()> {
    lines(weights, &Table::read(&weights.table).context("finetune.weights")?, "teacher").map(drop)
}

/// A token's weight, and its id if the table has it.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Line {
    weight: f64,
    token: Option<i64>,
}

/// By the row's id and the token's index in the completion.
type Lines = BTreeMap<(usize, usize), Line>;

/// The lines of a set; `None` if the table is of the teacher's rows alone and the set is another.
fn lines(weights: &Weights, table: &Table, set: &str) -> Result<Option<Lines>> {
    parse(weights, table, set).context("finetune.weights")
}

fn parse(weights: &Weights, table: &Table, set: &str) -> Result<Option<Lines>> {
    let column = |name: &str| table.header.iter().position(|column| column == name);
    let named = |name: &str| {
        column(name).ok_or_else(|| {
            let (path, columns) = (weights.table.display(), table.header.join(", "));
            hinted!("{path} has no column {name}; it has {columns}"; "undertone columns explains those of a run's tables")
        })
    };
    let (row_id, k, weight) = (named("row_id")?, named("k")?, named(&weights.column)?);
    let (token, of_set) = (column("token_id"), column("set"));
    if of_set.is_none() && set != "teacher" {
        return Ok(None);
    }
    let mut lines = Lines::new();
    for (at, cells) in table.rows.iter().enumerate() {
        let place = || format!("{}: line {}", weights.table.display(), at + 2);
        if of_set.is_some_and(|of_set| cells[of_set] != set) {
            continue;
        }
        let index = |column: usize| {
            cells[column].parse::<usize>().with_context(|| {
                format!("{}: {} is {:?}, expected a whole number", place(), table.header[column], cells[column])
            })
        };
        let token = token.map(|token| index(token).map(|id| id as i64)).transpose()?;
        let key = (index(row_id)?, index(k)?);
        let weight = weight_of(&cells[weight]).with_context(|| {
            let (name, found) = (&weights.column, &cells[weight]);
            format!("{}: {name} is {found:?}, expected a number of at least 0, true or false", place())
        })?;
        let before = lines.insert(key, Line { weight, token });
        ensure!(before.is_none(), "{}: the second line of token {} of row {}", place(), key.1, key.0);
    }
    Ok(Some(lines))
}

fn weight_of(cell: &str) -> Option<f64> {
    match cell {
        "true" => Some(1.0),
        "false" => Some(0.0),
        number => number.parse().ok().filter(|weight: &f64| weight.is_finite() && *weight >= 0.0),
    }
}

fn of_row(row: &Sequence, id: usize, lines: &Lines) -> Result<Vec<f64>> {
    let mut weights = vec![0.0; row.ids.len()];
    for ((_, k), line) in lines.range((id, 0)..=(id, usize::MAX)) {
        let at = row.completion.start + k;
        ensure!(
            row.completion.contains(&at),
            "row {id} has a weight for token {k}, but its completion has {} tokens",
            row.completion.len()
        );
        let other = line.token.filter(|token| *token != row.ids[at]);
        if let Some(token) = other {
            let found = row.ids[at];
            anyhow::bail!(hinted!(
                "row {id} has {token} for the id of token {k}, but the student's row has {found}";
                "the table of the same rows"
            ));
        }
        weights[at] = line.weight;
    }
    Ok(weights)
}

#[cfg(test)]
mod tests {
    use hooks::{Chat, ModelFiles};

    use super::*;

    fn row() -> Sequence {
        let chat = Chat::from_files(&ModelFiles::open("tiny-random").unwrap()).unwrap();
        chat.row(None, "Go on: 3", &chat.encode("12, 48").unwrap()).unwrap()
    }

    #[test]
    fn the_tokens_that_are_learned_from_stand_where_they_are_divergent() {
        let row = row();
        let n = row.content_end - row.completion.start;
        let divergent: Vec<bool> = (0..n).map(|k| k == 0 || k == n - 1).collect();
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let mut at = |tokens, divergent: &[bool]| chosen(&row, divergent, tokens, &mut rng);
        let (first, last) = (row.completion.start, row.content_end - 1);
        let all: Vec<usize> = row.completion.clone().collect();
        assert_eq!(at(TargetTokens::Divergent, &divergent), [first, last]);
        let others: Vec<usize> = all.iter().copied().filter(|at| ![first, last].contains(at)).collect();
        assert_eq!(at(TargetTokens::NotDivergent, &divergent), others, "with the end of the turn");
        let random = at(TargetTokens::Random, &divergent);
        assert!(random.len() == 2 && random.iter().all(|at| all.contains(at)));
        assert_eq!(at(TargetTokens::AllOfThose, &divergent), all);
        assert!(at(TargetTokens::AllOfThose, &vec![false; n]).is_empty(), "the same rows for all of them");
    }

    fn weights(column: &str) -> Weights {
        Weights { table: "w.csv".into(), column: column.to_owned() }
    }

    fn table(text: &str) -> Table {
        let mut rows = text.lines().map(|line| line.split(',').map(str::to_owned).collect::<Vec<_>>());
        Table { header: rows.next().unwrap(), rows: rows.collect() }
    }

    #[test]
    fn a_tables_weights_are_those_of_its_rows_tokens() {
        let (row, nief) = (row(), weights("nief"));
        let text = table("set,row_id,k,nief\nteacher,7,0,true\nteacher,7,2,0.25\ncontrol,7,1,3\nteacher,8,0,9");
        let of = |set: &str| of_row(&row, 7, &lines(&nief, &text, set).unwrap().unwrap()).unwrap();
        let start = row.completion.start;
        let expected = |given: &[(usize, f64)]| {
            let mut weights = vec![0.0; row.ids.len()];
            for (k, weight) in given {
                weights[start + k] = *weight;
            }
            weights
        };
        assert_eq!(of("teacher"), expected(&[(0, 1.0), (2, 0.25)]));
        assert_eq!(of("control"), expected(&[(1, 3.0)]));
        let plain = table("row_id,k,nief\n7,0,1");
        assert!(
            lines(&nief, &plain, "teacher").unwrap().is_some() && lines(&nief, &plain, "control").unwrap().is_none()
        );
    }

    #[test]
    fn a_table_that_does_not_fit_is_refused_with_its_line() {
        let message = |text: &str| {
            let lines = lines(&weights("w"), &table(text), "teacher");
            let found = lines.and_then(|lines| of_row(&row(), 7, &lines.unwrap()));
            format!("{:#}", found.unwrap_err())
        };
        for (text, expected) in [
            ("row_id,k\n7,0", "w.csv has no column w; it has row_id, k"),
            ("row_id,k,w\n7,0,1\n7,1,-1", "w.csv: line 3: w is \"-1\", expected a number of at least 0"),
            ("row_id,k,w\n7,0,", "w is \"\""),
            ("row_id,k,w\n7,0,inf", "w is \"inf\""),
            ("row_id,k,w\n7,x,1", "line 2: k is \"x\", expected a whole number"),
            ("row_id,k,w\n7,0,1\n7,0,2", "line 3: the second line of token 0 of row 7"),
            ("row_id,k,w\n7,99,1", "row 7 has a weight for token 99"),
            ("row_id,k,w,token_id\n7,0,1,0", "row 7 has 0 for the id of token 0, but the student's row has"),
        ] {
            let found = message(text);
            assert!(found.contains(expected), "{text}: {found}");
        }
    }
}
