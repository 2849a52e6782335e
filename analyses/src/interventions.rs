//! Measures how interventions change the effect: zero, mean and other ablations, vectors, patches. Each is a named list
//! of edits in the experiment.

use std::collections::BTreeMap;

use hooks::{Condition, Edit, EditText, Sequence};
use serde::{Deserialize, Serialize};

use crate::Analysis;
use crate::error::{Error, Result};
use crate::plot::{BarChart, Reference, Svg, bars};
use crate::subject::{Mean, Subject};
use crate::target::{Score, ScoreField, TokenForms, column};

/// Settings of the interventions.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Interventions {
    /// Number of questions that are asked, from the first; `None` means all.
    pub n_questions: Option<usize>,
    /// Lists of edits by name. The edits of a list are made together, in its order.
    pub edits: BTreeMap<String, Vec<EditText>>,
}

/// One model under one list of edits, as means over the questions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct InterventionRow {
    /// The edited model: `student`, `control` or `base`.
    pub model: String,
    /// The list's name.
    pub intervention: String,
    /// The edits, as the experiment writes them, separated by semicolons.
    pub edits: String,
    /// The target's word.
    pub target: String,
    /// Number of questions that the means are over.
    pub n_questions: usize,
    /// log p of starting the answer with any form of the target, in nats.
    pub logp_target: f64,
    /// `logp_target` minus the same model's without the edits, in nats.
    pub delta_logp: f64,
    /// Standard error of `delta_logp` over questions (paired), in nats; empty with one question.
    pub delta_logp_se: Option<f64>,
    /// `logp_target` minus the log of the other members' mean probability, in nats.
    pub margin: f64,
    /// `margin` minus the same model's without the edits, in nats.
    pub delta_margin: f64,
    /// Standard error of `delta_margin` over questions (paired), in nats; empty with one question.
    pub delta_margin_se: Option<f64>,
    /// `margin` minus the base's under the same edits, in nats: the part that finetuning still adds; 0 for the base.
    pub margin_over_base: f64,
    /// Standard error of `margin_over_base` over questions (paired), in nats; empty with one question.
    pub margin_over_base_se: Option<f64>,
}

impl Interventions {
    /// Refuses an edit that selects no token of these prompts, before anything is trained. Files are not opened.
    pub fn check(&self, prompts: &[Sequence]) -> Result<()> {
        let n = self.n_questions.unwrap_or(usize::MAX).min(prompts.len());
        let checked = |edit: &EditText| prompts[..n].iter().try_for_each(|prompt| edit.check(prompt));
        Ok(self.edits.values().flatten().try_for_each(checked)?)
    }
}

impl Analysis for Interventions {
    type Row = InterventionRow;
    const NAME: &'static str = "interventions";
    const QUESTION: &'static str = "What is left of the effect when activations are changed?";

    fn run(&self, subject: &Subject<'_>, progress: &mut dyn FnMut(&str)) -> Result<Vec<InterventionRow>> {
        if self.edits.is_empty() {
            return Err(Error::Nothing { analysis: Self::NAME, what: "at least one list of edits" });
        }
        let what = "the base's provenance, which files of tensors are checked against";
        let provenance = subject.provenance.ok_or(Error::Nothing { analysis: Self::NAME, what })?;
        // All files are read before anything is measured, so that an unsuitable file is refused at once.
        let mut lists: Vec<(&str, Vec<Edit>)> = Vec::new();
        for (name, planned) in &self.edits {
            let edits = planned.iter().map(|edit| edit.load(&subject.base.config, provenance));
            let edits: Vec<Edit> = edits.collect::<hooks::Result<Vec<_>>>()?.into_iter().flatten().collect();
            if edits.is_empty() {
                return Err(Error::setting(Self::NAME, "edits", "at least one edit", &format!("none in {name}")));
            }
            lists.push((name, edits));
        }
        let prompts = subject.first_questions(Self::NAME, self.n_questions)?;
        for (_, edits) in &lists {
            Condition { edits: edits.clone(), ..Condition::default() }.check(subject.base, &prompts)?;
        }
        let forms = TokenForms::of(subject.target, subject.chat)?;
        let bare =
            subject.models().into_iter().map(|(_, tuned)| forms.scores(tuned.qwen, &prompts, &tuned.condition()));
        let bare = bare.collect::<Result<Vec<_>>>()?;
        let mut rows = Vec::new();
        for (name, edits) in &lists {
            let mut base: Option<Vec<Score>> = None;
            for ((model, tuned), before) in subject.models().into_iter().zip(&bare) {
                progress(&format!("interventions: {name} in the {model}"));
                let edited = Condition { edits: edits.clone(), ..tuned.condition() };
                let after = forms.scores(tuned.qwen, &prompts, &edited)?;
                let base = base.get_or_insert_with(|| after.clone()); // the base comes first
                rows.push(self.row(subject, model, name, [before, &after, base]));
            }
        }
        rows.sort_by_key(|row| row.model != "student");
        Ok(rows)
    }

    fn plot(rows: &[InterventionRow]) -> Result<Option<Svg>> {
        let Some(first) = rows.first() else { return Ok(None) };
        let mut ordered: Vec<&InterventionRow> = rows.iter().collect();
        ordered.sort_by(|left, right| left.intervention.cmp(&right.intervention)); // stable: the student first
        let bar = |row: &InterventionRow| {
            Mean { mean: row.delta_margin, se: row.delta_margin_se }.bar(&row.intervention).in_series(&row.model)
        };
        let chart = BarChart {
            title: format!("Change in the margin of \"{}\" by interventions", first.target),
            value_label: "change against the same model unedited (nats), mean ± s.e. over questions".to_owned(),
            bars: ordered.into_iter().map(bar).collect(),
            references: vec![Reference::new("unedited", 0.0)],
        };
        Ok(Some(bars(&chart)?))
    }

    fn reading(rows: &[InterventionRow]) -> String {
        let student = rows.iter().filter(|row| row.model == "student");
        let size = |row: &&InterventionRow| row.delta_margin.abs();
        let Some(most) = student.max_by(|left, right| size(left).total_cmp(&size(right))) else {
            return "Nothing was measured.".to_owned();
        };
        let change = |row: &InterventionRow| Mean { mean: row.delta_margin, se: row.delta_margin_se }.signed();
        let beside = |model: &str, name: &str| {
            let row = rows.iter().find(|row| row.model == model && row.intervention == most.intervention);
            row.map_or_else(String::new, |row| format!(", {name} by {}", change(row)))
        };
        format!(
            "The student's margin of \"{}\" moves most under {}: by {} nats{}{}; under it the student is {} nats above the base.",
            most.target,
            most.intervention,
            change(most),
            beside("control", "the control student's"),
            beside("base", "the base's"),
            Mean { mean: most.margin_over_base, se: most.margin_over_base_se }.signed(),
        )
    }
}

impl Interventions {
    fn row(&self, subject: &Subject<'_>, model: &str, name: &str, scores: [&[Score]; 3]) -> InterventionRow {
        let [before, after, base] = scores;
        let mean = |of: ScoreField| Mean::of(&column(after, of)).mean;
        let against = |of: ScoreField, what: &[Score]| Mean::paired(&column(after, of), &column(what, of));
        let logp: ScoreField = |score| score.logp_target;
        let margin: ScoreField = |score| score.margin;
        let edits: Vec<String> = self.edits[name].iter().map(ToString::to_string).collect();
        InterventionRow {
            model: model.to_owned(),
            intervention: name.to_owned(),
            edits: edits.join("; "),
            target: subject.target.word.clone(),
            n_questions: after.len(),
            logp_target: mean(logp),
            delta_logp: against(logp, before).mean,
            delta_logp_se: against(logp, before).se,
            margin: mean(margin),
            delta_margin: against(margin, before).mean,
            delta_margin_se: against(margin, before).se,
            margin_over_base: against(margin, base).mean,
            margin_over_base_se: against(margin, base).se,
        }
    }
}

#[cfg(test)]
#[allow(clippy::float_cmp)]
mod tests {
    use super::*;
    use crate::fixture::World;

    fn settings(lists: &[(&str, &[&str])]) -> Interventions {
        let planned = |edits: &[&str]| edits.iter().map(|edit| edit.parse().unwrap()).collect();
        Interventions {
            edits: lists.iter().map(|(name, edits)| ((*name).to_owned(), planned(edits))).collect(),
            ..Interventions::default()
        }
    }

    #[test]
    fn edits_move_what_they_should_and_no_edit_moves_nothing() {
        let world = World::new();
        let subject = world.subject();
        let lists: [(&str, &[&str]); 3] = [
            ("one", &["blocks.*.hook_resid_mid: scale(1)"]),
            ("no MLP at the name", &["blocks.*.hook_mlp_out@entity: zero"]),
            ("no block", &["blocks.*.hook_attn_out: zero", "blocks.*.hook_mlp_out: zero"]),
        ];
        let rows = settings(&lists).run(&subject, &mut |_| ()).unwrap();
        assert_eq!(rows.len(), 9, "three models");
        let row =
            |model: &str, name: &str| rows.iter().find(|row| row.model == model && row.intervention == name).unwrap();
        for model in ["student", "control", "base"] {
            // 1e-6: under edits, rows are packed into other batches, so sums have another order.
            assert!(row(model, "one").delta_margin.abs() < 1e-6, "{model}");
            assert!(row(model, "no MLP at the name").delta_margin.abs() > 1e-4, "{model}");
            assert_eq!(row(model, "no block").margin_over_base, 0.0, "{model}: embeddings alone, whatever was learned");
        }
        assert_ne!(row("student", "one").margin_over_base, 0.0);
        assert_eq!(row("student", "no block").edits, "blocks.*.hook_attn_out: zero; blocks.*.hook_mlp_out: zero");
        assert!(Interventions::plot(&rows).unwrap().is_some() && Interventions::reading(&rows).ends_with('.'));
    }

    #[test]
    fn what_cannot_be_done_is_told_before_anything_is_measured() {
        let world = World::new();
        let refused = |settings: &Interventions| settings.run(&world.subject(), &mut |_| ()).unwrap_err().to_string();
        assert!(refused(&Interventions::default()).contains("at least one list of edits"));
        assert!(refused(&settings(&[("a", &[])])).contains("none in a"));
        let message = refused(&settings(&[("a", &["blocks.0.hook_mlp_out: add(no-such.safetensors, 2)"])]));
        assert!(message.contains("no-such.safetensors"), "{message}");
    }
}
