//! Measures which single tokens carry the effect: the adapter acts at one position of the prompt at a time, or
//! everywhere except there.
//!
//! Positions that all questions share are counted from the start (the system prompt, the user's header) and from the
//! end (the assistant's header). The tokens between them differ from question to question and count as one place, the
//! user's content.

use hooks::{Condition, Gate, Sequence, TokenClass, Tokens};
use serde::{Deserialize, Serialize};

use crate::Analysis;
use crate::error::{Error, Result};
use crate::plot::{Position, PositionChart, Reference, Svg, positions};
use crate::subject::{Mean, Subject};
use crate::target::{Score, ScoreField, TokenForms, column};

/// Settings of the position scan.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PositionScan {
    /// Number of questions that are asked, from the first; `None` means all.
    pub n_questions: Option<usize>,
}

/// One place of the prompt, as means over the questions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PositionScanRow {
    /// The position in the prompts, from 0; negative ones count from the end; empty for `(user content)` and
    /// `(everywhere)`.
    pub position: Option<i64>,
    /// The token's text; `(user content)` for all tokens of the user's text, `(everywhere)` for all tokens.
    pub token: String,
    /// The class of the token, as `undertone tokens` prints it; empty for `(everywhere)`.
    pub class: String,
    /// How the adapter acts at generated tokens: `same_as_unselected`, as at prompt tokens that the gate does not name.
    pub decode_policy: String,
    /// The target's word.
    pub target: String,
    /// Number of questions that the means are over.
    pub n_questions: usize,
    /// Margin with the adapter acting here alone, minus the base's, in nats.
    pub delta_margin_only: f64,
    /// Standard error of `delta_margin_only` over questions (paired), in nats; empty with one question.
    pub delta_margin_only_se: Option<f64>,
    /// Margin with the adapter acting everywhere except here, minus the base's, in nats; for `(everywhere)` it acts
    /// nowhere.
    pub delta_margin_except: f64,
    /// Standard error of `delta_margin_except` over questions (paired), in nats; empty with one question.
    pub delta_margin_except_se: Option<f64>,
    /// log p(target) with the adapter acting here alone, minus the base's, in nats.
    pub delta_logp_only: f64,
    /// log p(target) with the adapter acting everywhere except here, minus the base's, in nats.
    pub delta_logp_except: f64,
}

/// A place, with the gates that act only there and everywhere except there.
pub(crate) struct ScannedPlace {
    pub(crate) position: Option<i64>,
    pub(crate) token: String,
    pub(crate) class: String,
    only: Gate,
    except: Gate,
}

impl Analysis for PositionScan {
    type Row = PositionScanRow;
    const NAME: &'static str = "position_scan";
    const QUESTION: &'static str = "Which single tokens of the prompt carry the effect?";

    fn run(&self, subject: &Subject<'_>, progress: &mut dyn FnMut(&str)) -> Result<Vec<PositionScanRow>> {
        let Some(adapter) = subject.student.adapter else {
            let reason = "a gate switches a LoRA on and off position by position, and full finetuning leaves none";
            return Err(Error::NeedsAdapter { analysis: Self::NAME, reason: reason.to_owned() });
        };
        let prompts = subject.first_questions(Self::NAME, self.n_questions)?;
        let forms = TokenForms::of(subject.target, subject.chat)?;
        let base = forms.scores(subject.base, &prompts, &Condition::default())?;
        let change = |scores: &[Score]| {
            let of = |what: ScoreField| Mean::paired(&column(scores, what), &column(&base, what));
            [of(|score| score.margin), of(|score| score.logp_target)]
        };
        let places = places(subject, &prompts)?;
        progress(&format!("position scan: {} places, {} questions", places.len(), prompts.len()));
        let gates = places.iter().flat_map(|place| [&place.only, &place.except]);
        let conditions: Vec<Condition<'_>> =
            gates.map(|gate| Condition::adapted(adapter).gated(gate.clone())).collect();
        let scores = forms.scores_under(subject.student.qwen, &prompts, &conditions)?;
        let mut rows = Vec::new();
        for (place, scores) in places.into_iter().zip(scores.chunks_exact(2)) {
            let ([only, only_logp], [except, except_logp]) = (change(&scores[0]), change(&scores[1]));
            rows.push(PositionScanRow {
                position: place.position,
                token: place.token,
                class: place.class,
                decode_policy: place.only.decode_policy().to_owned(),
                target: subject.target.word.clone(),
                n_questions: prompts.len(),
                delta_margin_only: only.mean,
                delta_margin_only_se: only.se,
                delta_margin_except: except.mean,
                delta_margin_except_se: except.se,
                delta_logp_only: only_logp.mean,
                delta_logp_except: except_logp.mean,
            });
        }
        Ok(rows)
    }

    fn plot(rows: &[PositionScanRow]) -> Result<Option<Svg>> {
        let Some(everywhere) = rows.iter().find(|row| row.class.is_empty()) else { return Ok(None) };
        let bar = |row: &PositionScanRow| {
            let (value, se) = (row.delta_margin_only, row.delta_margin_only_se);
            let interval = se.map(|se| (value - se, value + se));
            let ring = Some(everywhere.delta_margin_only - row.delta_margin_except);
            Position { token: row.token.clone(), class: family(&row.class).to_owned(), value, interval, ring }
        };
        Ok(Some(positions(&PositionChart {
            title: format!("Which single tokens carry the change of {}'s margin", everywhere.target),
            x_label: "token of the prompt".to_owned(),
            value_label: "nats: bar, adapter here alone; ring, what is lost without it here".to_owned(),
            positions: rows.iter().filter(|row| !row.class.is_empty()).map(bar).collect(),
            references: vec![
                Reference::new("base", 0.0),
                Reference::new("adapter everywhere", everywhere.delta_margin_only),
            ],
        })?))
    }

    fn reading(rows: &[PositionScanRow]) -> String {
        let Some(all) = rows.iter().find(|row| row.class.is_empty()) else {
            return "Nothing was measured.".to_owned();
        };
        let full = Mean { mean: all.delta_margin_only, se: all.delta_margin_only_se };
        let places = || rows.iter().filter(|row| !row.class.is_empty());
        let only = |a: &&PositionScanRow, b: &&PositionScanRow| a.delta_margin_only.total_cmp(&b.delta_margin_only);
        let except =
            |a: &&PositionScanRow, b: &&PositionScanRow| a.delta_margin_except.total_cmp(&b.delta_margin_except);
        let said = |row: &PositionScanRow, mean: f64, se: Option<f64>| {
            let mean = Mean { mean, se }.signed();
            match row.position {
                Some(position) => format!("{:?} at position {position} ({}): {mean}", row.token, row.class),
                None => format!("{}: {mean}", row.token),
            }
        };
        let ungated =
            format!("With the adapter everywhere the margin of {} changes by {} nats", all.target, full.signed());
        match (places().max_by(only), places().min_by(except)) {
            (Some(most), Some(least)) => format!(
                "{ungated}. Acting at one token alone it changes most at {}; left out at one token, least is kept without {}.",
                said(most, most.delta_margin_only, most.delta_margin_only_se),
                said(least, least.delta_margin_except, least.delta_margin_except_se),
            ),
            _ => ungated + ".",
        }
    }
}

/// The kind of a class, which gives its colour.
fn family(class: &str) -> &'static str {
    match class {
        "sys.entity" => "entity",
        "sys.content_other" => "system content",
        "user.content" => "user content",
        _ => "template",
    }
}

/// The places that all prompts share, in the order of the text, and then the whole prompt.
pub(crate) fn places(subject: &Subject<'_>, prompts: &[Sequence]) -> Result<Vec<ScannedPlace>> {
    let first = &prompts[0];
    let shared = |same: &dyn Fn(&Sequence, usize) -> bool| {
        (0..first.ids.len())
            .take_while(|at| prompts.iter().all(|prompt| *at < prompt.ids.len() && same(prompt, *at)))
            .count()
    };
    let outside = |at: usize| first.classes[at] != TokenClass::UserContent;
    let n = first.ids.len();
    let head = shared(&|prompt, at| prompt.ids[at] == first.ids[at] && outside(at));
    let tail =
        shared(&|prompt, at| prompt.ids[prompt.ids.len() - 1 - at] == first.ids[n - 1 - at] && outside(n - 1 - at));
    let tail = tail.min(n - head);
    let mut places = Vec::new();
    let place = |position: i64, at: usize| -> Result<ScannedPlace> {
        let only = Tokens::position(position);
        Ok(ScannedPlace {
            position: Some(position),
            token: subject.chat.token_text(first.ids[at])?,
            class: first.classes[at].name().to_owned(),
            except: Gate::except(only.clone()),
            only: Gate::only(only),
        })
    };
    for at in 0..head {
        places.push(place(at as i64, at)?);
    }
    if prompts.iter().all(|prompt| prompt.present().contains(&TokenClass::UserContent)) {
        let (only, except) = ("only:user.content".parse()?, "except:user.content".parse()?);
        let class = TokenClass::UserContent.name().to_owned();
        places.push(ScannedPlace { position: None, token: "(user content)".to_owned(), class, only, except });
    }
    for at in n - tail..n {
        places.push(place(at as i64 - n as i64, at)?);
    }
    let (only, except) = (Gate::EVERYWHERE, Gate::NOWHERE);
    places.push(ScannedPlace { position: None, token: "(everywhere)".to_owned(), class: String::new(), only, except });
    Ok(places)
}

#[cfg(test)]
#[allow(clippy::float_cmp)]
mod tests {
    use super::*;
    use crate::fixture::World;

    #[test]
    fn every_shared_token_is_a_place_and_the_gates_are_those_of_the_classes() {
        let world = World::new();
        let subject = world.subject();
        let rows = PositionScan::default().run(&subject, &mut |_| ()).unwrap();
        let prompts = subject.question_prompts("test").unwrap();
        let outside = prompts[0].classes.iter().filter(|class| **class != TokenClass::UserContent).count();
        assert_eq!(rows.len(), outside + 2, "the user's content and the whole prompt are a place each");
        assert_eq!(rows[0].position, Some(0));
        assert_eq!(rows[rows.len() - 2].position, Some(-1));

        // If a class is one token, the scan and the ablation by classes agree. They also agree on the whole prompt.
        let forms = TokenForms::of(subject.target, subject.chat).unwrap();
        let margin = |gate: &str| {
            let condition = subject.student.gated(gate.parse().unwrap());
            Mean::of(&column(&forms.scores(&world.qwen, &prompts, &condition).unwrap(), |score| score.margin)).mean
        };
        let row = |class: &str| rows.iter().find(|row| row.class == class).unwrap();
        for class in ["asst.nl", "user.role", "user.content", "asst.im_start"] {
            let (only, except) = (margin(&format!("only:{class}")), margin(&format!("except:{class}")));
            assert!((row(class).delta_margin_only - (only - margin("nowhere"))).abs() < 1e-4, "{class}");
            assert!((row(class).delta_margin_except - (except - margin("nowhere"))).abs() < 1e-4, "{class}");
        }
        assert!(row("asst.nl").delta_margin_only.abs() > 1e-4, "the place does something");
        let whole = rows.last().unwrap();
        assert!((whole.delta_margin_only - (margin("everywhere") - margin("nowhere"))).abs() < 1e-4);
        assert_eq!(whole.delta_margin_except, 0.0);
        assert!(PositionScan::plot(&rows).unwrap().is_some() && PositionScan::reading(&rows).ends_with('.'));
    }
}
