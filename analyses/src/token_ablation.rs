//! Measures which tokens carry the effect: the adapter is switched off at some tokens, in one forward pass. Attention
//! is causal and the adapter acts per token, so a gate equals running the prompt in pieces with the adapter on and off.

use hooks::{Condition, Gate, Selection, Sequence, TokenClass};
use serde::{Deserialize, Serialize};

use crate::Analysis;
use crate::error::{Error, Result};
use crate::plot::{Bar, BarChart, Reference, Svg, bars};
use crate::subject::{Mean, Subject};
use crate::target::{Score, ScoreField, TokenForms, column};

/// Settings of the token ablation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TokenAblation {
    /// The gates to compare.
    pub gates: Vec<Gate>,
    /// Whether to add `only:CLASS` and `except:CLASS` for every class of the prompts.
    pub scan: bool,
    /// Whether the control student is also measured under all gates, rather than under `everywhere` alone.
    pub control_gates: bool,
    /// Number of questions that are asked, from the first; `None` means all.
    pub n_questions: Option<usize>,
}

impl Default for TokenAblation {
    fn default() -> Self {
        let unions = ["entity", "template", "system", "user", "assistant"];
        let named = unions.into_iter().filter_map(|name| name.parse().ok()).flat_map(both_ways);
        let gates = [Gate::EVERYWHERE, Gate::NOWHERE].into_iter().chain(named).collect();
        Self { gates, scan: false, control_gates: false, n_questions: None }
    }
}

/// One gate of one student, as means over the questions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TokenAblationRow {
    /// The student whose adapter is gated: `student`, or `control` (finetuned on an untouched teacher's numbers).
    pub model: String,
    /// The gate: the tokens, blocks and projections at which the adapter acts.
    pub gate: String,
    /// How the adapter acts at generated tokens: `same_as_unselected`; `named` if the gate names them; `on` or `off` if
    /// it limits only blocks or projections, or selects by `not(..)`.
    pub decode_policy: String,
    /// `measured`, or `selects no token` of these prompts: the measured columns are then empty.
    pub status: String,
    /// The target's word.
    pub target: String,
    /// Number of questions that the means are over.
    pub n_questions: usize,
    /// Mean number of prompt tokens at which the adapter acts, per question.
    pub n_tokens_on: Option<f64>,
    /// Mean number of prompt tokens.
    pub n_tokens: f64,
    /// log p of starting the answer with any form of the target, in nats.
    pub logp_target: Option<f64>,
    /// Standard error of `logp_target` over questions, in nats.
    pub logp_target_se: Option<f64>,
    /// Mean probability that the answer starts with any form of the target (of one or several tokens), 0 to 1.
    pub p_target_first: Option<f64>,
    /// `logp_target` minus the log of the other members' mean probability, in nats.
    pub margin: Option<f64>,
    /// Standard error of `margin` over questions, in nats.
    pub margin_se: Option<f64>,
    /// `logp_target` minus the base's, in nats.
    pub delta_logp: Option<f64>,
    /// Standard error of `delta_logp` over questions (paired), in nats.
    pub delta_logp_se: Option<f64>,
    /// `margin` minus the base's, in nats.
    pub delta_margin: Option<f64>,
    /// Standard error of `delta_margin` over questions (paired), in nats.
    pub delta_margin_se: Option<f64>,
    /// Fraction of the ungated adapter's change in `logp_target` that is left: `delta_logp` over the same model's at
    /// `everywhere`; empty unless the latter is three of its standard errors clear of zero.
    pub recovered_logp: Option<f64>,
    /// Fraction of the ungated adapter's change in `margin` that is left: `delta_margin` over the same model's at
    /// `everywhere`; empty unless the latter is three of its standard errors clear of zero.
    pub recovered_margin: Option<f64>,
}

impl Analysis for TokenAblation {
    type Row = TokenAblationRow;
    const NAME: &'static str = "token_ablation";
    const QUESTION: &'static str = "At which tokens must the adapter act for the student to prefer the target?";

    fn run(&self, subject: &Subject<'_>, progress: &mut dyn FnMut(&str)) -> Result<Vec<TokenAblationRow>> {
        if subject.student.adapter.is_none() {
            let reason = "a gate switches a LoRA on and off token by token, and full finetuning leaves none; \
                          direction, divergence and target_rate work without";
            return Err(Error::NeedsAdapter { analysis: Self::NAME, reason: reason.to_owned() });
        }
        let prompts = subject.first_questions(Self::NAME, self.n_questions)?;
        let forms = TokenForms::of(subject.target, subject.chat)?;
        let base = forms.scores(subject.base, &prompts, &Condition::default())?;

        let mut rows = Vec::new();
        for (name, model) in subject.models().into_iter().filter(|(_, model)| model.adapter.is_some()) {
            let gates =
                if name == "student" || self.control_gates { self.all_gates(&prompts) } else { vec![Gate::EVERYWHERE] };
            let on = gates.iter().map(|gate| self.n_tokens_on(gate, &prompts)).collect::<Result<Vec<_>>>()?;
            let measured: Vec<&Gate> = gates.iter().zip(&on).filter_map(|(gate, on)| on.and(Some(gate))).collect();
            progress(&format!("token ablation of the {name}: {} gates, {} questions", measured.len(), prompts.len()));
            let conditions: Vec<Condition<'_>> =
                [&Gate::EVERYWHERE].into_iter().chain(measured).map(|gate| model.gated(gate.clone())).collect();
            let mut scores = forms.scores_under(model.qwen, &prompts, &conditions)?.into_iter();
            let everywhere = scores.next().unwrap_or_default();
            let around = Around { subject, name, prompts: &prompts, base: &base, everywhere: &everywhere };
            for (gate, on) in gates.iter().zip(on) {
                let measured = on.and_then(|on| Some((scores.next()?, on)));
                rows.push(around.row(gate, measured.as_ref().map(|(scores, on)| (scores.as_slice(), *on))));
            }
        }
        rows.sort_by_key(|row| row.model != "student");
        Ok(rows)
    }

    fn plot(rows: &[TokenAblationRow]) -> Result<Option<Svg>> {
        let change = |row: &TokenAblationRow| Some(Mean { mean: row.delta_logp?, se: row.delta_logp_se });
        let student = || rows.iter().filter(|row| row.model == "student");
        let Some(first) = student().next() else { return Ok(None) };
        // `only` and `except` of the same tokens are neighbours. The ungated adapter is a line across all bars.
        let parts = |row: &TokenAblationRow| {
            let (series, tokens) = row.gate.split_once(':')?;
            Some((tokens.to_owned(), series.to_owned()))
        };
        let clusters = distinct(student().filter_map(parts).map(|(tokens, _)| tokens));
        let of = |tokens: &String, kind: &str| {
            student().find(|row| parts(row).is_some_and(|(of, series)| of == *tokens && series == kind))
        };
        let both = |tokens: &String| {
            ["only", "except"].map(|kind| Some(change(of(tokens, kind)?)?.bar(tokens).in_series(kind)))
        };
        let mut found: Vec<Bar> = clusters.iter().flat_map(both).flatten().collect();
        if found.is_empty() {
            found = student().filter_map(|row| Some(change(row)?.bar(&row.gate))).collect();
        }
        let full = rows.iter().filter(|row| row.gate == "everywhere");
        let references =
            full.filter_map(|row| Some(Reference::new(format!("{}, everywhere", row.model), change(row)?.mean)));
        let chart = BarChart {
            title: format!("Change in log p({}) with the adapter at some tokens only", first.target),
            value_label: "change against the base (nats), mean ± s.e. over questions".to_owned(),
            bars: found,
            references: [Reference::new("base", 0.0)].into_iter().chain(references).collect(),
        };
        Ok(Some(bars(&chart)?))
    }

    fn reading(rows: &[TokenAblationRow]) -> String {
        let found = |model: &str, gate: &str| rows.iter().find(|row| row.model == model && row.gate == gate);
        let Some(full) = found("student", "everywhere") else {
            return "The gate everywhere was not among those measured, so there is nothing to compare with.".to_owned();
        };
        let change =
            |row: &TokenAblationRow| Mean { mean: row.delta_logp.unwrap_or_default(), se: row.delta_logp_se }.signed();
        let control = match found("control", "everywhere") {
            Some(control) => format!("the control student's by {}", change(control)),
            None => "there is no control student".to_owned(),
        };
        let ungated =
            format!("Ungated, the adapter changes log p({}) by {} nats ({control})", full.target, change(full));
        let unselected = match unselected(rows)[..] {
            [] => String::new(),
            ref gates => format!(" The prompts have no token for {}.", gates.join(", ")),
        };
        if full.recovered_logp.is_none() {
            return format!(
                "{ungated}; that is not three standard errors clear of zero, so no fractions are given and no gate says where it lives.{unselected}"
            );
        }
        let recovered = |row: &TokenAblationRow| row.recovered_logp.unwrap_or_default();
        let percent = |row: &TokenAblationRow| format!("{} {:.0} %", row.gate, 100.0 * recovered(row));
        let by_fraction = |a: &&TokenAblationRow, b: &&TokenAblationRow| recovered(a).total_cmp(&recovered(b));
        let gates = |kind: &'static str| {
            rows.iter()
                .filter(move |row| row.model == "student" && row.recovered_logp.is_some() && row.gate.starts_with(kind))
        };
        match (gates("only:").max_by(by_fraction), gates("except:").min_by(by_fraction)) {
            (Some(most), Some(least)) => {
                format!(
                    "{ungated}; acting at one kind of token, {} keeps most of it; leaving one out, {} is left with least.{unselected}",
                    percent(most),
                    percent(least)
                )
            }
            _ => format!("{ungated}.{unselected}"),
        }
    }
}

/// The status of a gate that selects no token of the prompts.
pub const NO_TOKEN: &str = "selects no token";

/// The student's gates that select no token of the prompts and so were not measured.
pub fn unselected(rows: &[TokenAblationRow]) -> Vec<&str> {
    let of_student = rows.iter().filter(|row| row.model == "student" && row.status == NO_TOKEN);
    of_student.map(|row| row.gate.as_str()).collect()
}

/// The gates that act at these tokens alone, and at all others.
fn both_ways(classes: Selection) -> [Gate; 2] {
    [Gate::only(classes.clone()), Gate::except(classes)]
}

/// The values without repetitions, in the order of their first occurrence.
fn distinct<T: PartialEq>(values: impl IntoIterator<Item = T>) -> Vec<T> {
    let mut found = Vec::new();
    for value in values {
        if !found.contains(&value) {
            found.push(value);
        }
    }
    found
}

/// The student, its prompts, and the scores that a gate's are compared with.
struct Around<'a> {
    subject: &'a Subject<'a>,
    name: &'a str,
    prompts: &'a [Sequence],
    base: &'a [Score],
    everywhere: &'a [Score],
}

impl TokenAblation {
    /// Refuses an explicit gate that selects no token of these prompts, before anything is trained. Gates of the
    /// default list may select none in some contexts; the table then says so.
    pub fn check(&self, prompts: &[Sequence]) -> Result<()> {
        if self.gates == Self::default().gates {
            return Ok(());
        }
        let n = self.n_questions.unwrap_or(usize::MAX).min(prompts.len());
        self.gates.iter().try_for_each(|gate| self.n_tokens_on(gate, &prompts[..n]).map(drop))
    }

    /// The gates of the settings and, for a scan, two per class that occurs.
    fn all_gates(&self, prompts: &[Sequence]) -> Vec<Gate> {
        let mut gates = self.gates.clone();
        if self.scan {
            let present = |class: &TokenClass| prompts.iter().any(|prompt| prompt.classes.contains(class));
            gates.extend(TokenClass::ALL.into_iter().filter(present).map(Selection::from).flat_map(both_ways));
        }
        distinct(gates)
    }

    /// Mean number of prompt tokens at which the adapter acts; `None` if a gate of the default list selects none.
    fn n_tokens_on(&self, gate: &Gate, prompts: &[Sequence]) -> Result<Option<f64>> {
        match prompts.iter().map(|prompt| gate.acts(prompt)).collect::<hooks::Result<Vec<_>>>() {
            Ok(acts) => Ok(Some(acts.iter().flatten().filter(|on| **on).count() as f64 / acts.len() as f64)),
            // An explicit gate must select tokens. Gates of the default list may select none in some contexts.
            Err(hooks::Error::EmptySelection { .. }) if self.gates == Self::default().gates => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

impl Around<'_> {
    fn row(&self, gate: &Gate, measured: Option<(&[Score], f64)>) -> TokenAblationRow {
        let mean = |of: ScoreField| measured.map(|(scores, _)| Mean::of(&column(scores, of)));
        let delta =
            |of: ScoreField| measured.map(|(scores, _)| Mean::paired(&column(scores, of), &column(self.base, of)));
        let whole = |of: ScoreField| Mean::paired(&column(self.everywhere, of), &column(self.base, of));
        let recovered = |of: ScoreField| whole(of).share(delta(of)?.mean);
        let logp: ScoreField = |score| score.logp_target;
        let margin: ScoreField = |score| score.margin;
        TokenAblationRow {
            model: self.name.to_owned(),
            gate: gate.to_string(),
            decode_policy: gate.decode_policy().to_owned(),
            status: if measured.is_some() { "measured" } else { NO_TOKEN }.to_owned(),
            target: self.subject.target.word.clone(),
            n_questions: self.prompts.len(),
            n_tokens_on: measured.map(|(_, on)| on),
            n_tokens: self.prompts.iter().map(|prompt| prompt.ids.len() as f64).sum::<f64>()
                / self.prompts.len() as f64,
            logp_target: mean(logp).map(|mean| mean.mean),
            logp_target_se: mean(logp).and_then(|mean| mean.se),
            p_target_first: mean(|s| s.logp_target.exp()).map(|mean| mean.mean),
            margin: mean(margin).map(|mean| mean.mean),
            margin_se: mean(margin).and_then(|mean| mean.se),
            delta_logp: delta(logp).map(|delta| delta.mean),
            delta_logp_se: delta(logp).and_then(|delta| delta.se),
            delta_margin: delta(margin).map(|delta| delta.mean),
            delta_margin_se: delta(margin).and_then(|delta| delta.se),
            recovered_logp: recovered(logp),
            recovered_margin: recovered(margin),
        }
    }
}

#[cfg(test)]
#[allow(clippy::float_cmp)]
mod tests {
    use super::*;
    use crate::fixture::World;

    fn run(subject: &Subject<'_>, gates: &[&str]) -> Result<Vec<TokenAblationRow>> {
        let gates = gates.iter().map(|gate| gate.parse().unwrap()).collect();
        TokenAblation { gates, ..TokenAblation::default() }.run(subject, &mut |_| ())
    }

    #[test]
    fn nowhere_is_the_base_and_all_classes_are_everywhere() {
        let world = World::new();
        let subject = world.subject();
        let rows = run(&subject, &["everywhere", "nowhere", "only:system+user+assistant", "only:user"]).unwrap();
        assert_eq!(rows.len(), 5, "the control is measured ungated");
        let [everywhere, nowhere, all, user, control] = &rows[..] else { panic!() };
        assert_eq!((nowhere.delta_logp, nowhere.delta_margin), (Some(0.0), Some(0.0)));
        assert_eq!(nowhere.n_tokens_on, Some(0.0));
        assert!((everywhere.delta_logp.unwrap() - all.delta_logp.unwrap()).abs() < 1e-4);
        assert!(everywhere.delta_logp.unwrap().abs() > 1e-3 && all.decode_policy == "named");
        assert!((user.delta_logp.unwrap() - everywhere.delta_logp.unwrap()).abs() > 1e-4);
        assert!(user.n_tokens_on.unwrap() > 0.0 && user.n_tokens_on.unwrap() < user.n_tokens);
        assert_eq!((control.model.as_str(), control.gate.as_str()), ("control", "everywhere"));

        let forms = TokenForms::of(subject.target, subject.chat).unwrap();
        let prompts = subject.question_prompts("test").unwrap();
        let student = forms.scores(&world.qwen, &prompts, &subject.student.condition()).unwrap();
        // Without the gates the rows are in other batches, so sums have another order.
        let alone = Mean::of(&column(&student, |s| s.logp_target)).mean;
        assert!((everywhere.logp_target.unwrap() - alone).abs() < 1e-5, "{alone}");
        assert!(TokenAblation::plot(&rows).unwrap().is_some() && TokenAblation::reading(&rows).ends_with('.'));
    }

    #[test]
    fn a_fraction_needs_a_change_to_be_a_fraction_of() {
        let world = World::new();
        let subject = world.subject();
        let score = |logp| Score { logp_target: logp, margin: logp, rank: 1.0, first_token_rank: 1.0 };
        let prompts = subject.question_prompts("test").unwrap();
        let row = |everywhere: [f64; 3]| {
            let (base, everywhere) = ([-4.0, -5.0, -6.0].map(score), everywhere.map(score));
            let around =
                Around { subject: &subject, name: "student", prompts: &prompts, base: &base, everywhere: &everywhere };
            around.row(&Gate::EVERYWHERE, Some((&[-3.5, -4.5, -5.5].map(score), 1.0)))
        };
        assert!((row([-3.0, -4.1, -5.0]).recovered_logp.unwrap() - 0.5 / 0.966_666_666).abs() < 1e-6);
        assert_eq!(row([-3.0, -5.5, -5.9]).recovered_logp, None);
    }

    #[test]
    fn gates_without_tokens_are_said_aloud() {
        let world = World::new();
        let mut subject = world.subject();
        subject.system = Some(String::new());
        let rows = TokenAblation::default().run(&subject, &mut |_| ()).unwrap();
        let entity = rows.iter().find(|row| row.gate == "only:entity").unwrap();
        assert_eq!((entity.status.as_str(), entity.logp_target), ("selects no token", None));
        assert!(rows.iter().any(|row| row.gate == "only:user" && row.status == "measured"));
        let reading = TokenAblation::reading(&rows);
        assert!(reading.ends_with(" The prompts have no token for only:entity, except:entity."), "{reading}");
        assert!(run(&subject, &["everywhere", "only:entity"]).unwrap_err().to_string().contains("only:entity"));
        let prompts = subject.question_prompts("test").unwrap();
        let asked = |gates: &[&str]| {
            let gates = gates.iter().map(|gate| gate.parse().unwrap()).collect();
            TokenAblation { gates, ..TokenAblation::default() }.check(&prompts).map_err(|error| error.to_string())
        };
        assert!(TokenAblation::default().check(&prompts).is_ok() && asked(&["everywhere", "only:user"]).is_ok());
        let refused = asked(&["everywhere", "only:entity"]).unwrap_err();
        assert!(
            refused.starts_with("gate only:entity selects no token of the prompt; it holds the classes"),
            "{refused}"
        );
        let scan = TokenAblation { scan: true, ..TokenAblation::default() }
            .all_gates(&subject.question_prompts("test").unwrap());
        let scanned: Vec<String> = scan.iter().map(ToString::to_string).collect();
        assert!(
            ["only:asst.nl", "except:asst.nl"].iter().all(|gate| scanned.contains(&(*gate).to_owned()))
                && !scanned.contains(&"only:sys.entity".to_owned()),
            "{scanned:?}"
        );
    }

    #[test]
    fn full_finetuning_has_nothing_to_gate() {
        let world = World::new();
        let mut subject = world.subject();
        subject.student.adapter = None;
        assert!(run(&subject, &["everywhere"]).unwrap_err().to_string().contains("adapter"));
    }
}
