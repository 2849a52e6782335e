//! Measures the effect: the probability that base, control and student name the target, exact and by sampled answers.

use std::collections::BTreeSet;
use std::ops::Range;

use hooks::{Answer, Sampling, Sequence, generate, stream_seed};
use serde::{Deserialize, Serialize};

use crate::Analysis;
use crate::error::{Error, Result};
use crate::plot::{BarChart, Reference, Svg, bars};
use crate::subject::{Mean, Subject, Tuned, mean};
use crate::target::{Score, TokenForms, column};

/// Settings of the target rate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TargetRate {
    /// Answers sampled per question and model, at temperature 1; 0 for none.
    pub n_samples: usize,
    /// The most tokens an answer may have.
    pub max_new_tokens: usize,
    /// Number of answers drawn at once.
    pub batch: usize,
}

impl Default for TargetRate {
    fn default() -> Self {
        Self { n_samples: 20, max_new_tokens: 32, batch: 64 }
    }
}

/// One model on one question, or its means over all questions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TargetRateRow {
    /// `question`, or `mean` over all questions.
    pub scope: String,
    /// `base`, `control` (finetuned on an untouched teacher's numbers), `student`, or `other_trait` (finetuned on the
    /// numbers of a teacher that likes something else).
    pub model: String,
    /// The question's index; empty for the mean.
    pub question_id: Option<usize>,
    /// The question; empty for the mean.
    pub question: String,
    /// The target's word.
    pub target: String,
    /// Number of questions that the values are means over: 1 for a question.
    pub n_questions: usize,
    /// log p of starting the answer with any form of the target, in nats.
    pub logp_target: f64,
    /// Standard error of `logp_target` over questions, in nats; for the mean only.
    pub logp_target_se: Option<f64>,
    /// `logp_target` minus the log of the other members' mean probability, in nats.
    pub margin: f64,
    /// Standard error of `margin` over questions, in nats; for the mean only.
    pub margin_se: Option<f64>,
    /// `logp_target` minus the base's at the same questions, in nats.
    pub delta_logp: f64,
    /// Standard error of `delta_logp` over questions (paired), in nats; for the mean only.
    pub delta_logp_se: Option<f64>,
    /// `margin` minus the base's at the same questions, in nats.
    pub delta_margin: f64,
    /// Standard error of `delta_margin` over questions (paired), in nats; for the mean only.
    pub delta_margin_se: Option<f64>,
    /// Rank of the target among the members of its category, 1 the most likely.
    pub rank: f64,
    /// Best rank in the vocabulary of a token that starts the target, 1 the most likely.
    pub first_token_rank: f64,
    /// Number of sampled answers.
    pub n_samples: usize,
    /// Number of distinct answers to one question (for the mean, the mean over questions); empty without sampling.
    pub n_distinct: Option<f64>,
    /// Share of the sampled answers that name the target, 0 to 1; empty without sampling.
    pub p_target: Option<f64>,
    /// Standard error of `p_target` over questions; for the mean only.
    pub p_target_se: Option<f64>,
    /// Share of the sampled answers that name any member of the category, 0 to 1; empty without sampling.
    pub p_valid: Option<f64>,
    /// Share of the answers that name the target among those that name any member, 0 to 1; empty without such answers.
    pub p_target_valid: Option<f64>,
    /// Share of the sampled answers that name a model instead, 0 to 1; empty without sampling.
    pub p_self: Option<f64>,
}

/// Counts over the sampled answers to one question.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Sampled {
    n: usize,
    distinct: usize,
    target: usize,
    valid: usize,
    own: usize,
}

impl Analysis for TargetRate {
    type Row = TargetRateRow;
    const NAME: &'static str = "target_rate";
    const QUESTION: &'static str = "How likely is the target as an answer, before and after finetuning on numbers?";

    fn run(&self, subject: &Subject<'_>, progress: &mut dyn FnMut(&str)) -> Result<Vec<TargetRateRow>> {
        let prompts = subject.question_prompts(Self::NAME)?;
        let forms = TokenForms::of(subject.target, subject.chat)?;
        let mut base: Option<Vec<Score>> = None;
        let mut rows = Vec::new();
        let other = subject.other_trait.map(|other| ("other_trait", other));
        for (name, model) in subject.models().into_iter().chain(other) {
            progress(&format!("target rate of the {name}: {} questions", prompts.len()));
            let scores = forms.scores(model.qwen, &prompts, &model.condition())?;
            let sampled = self.sample(subject, model, &prompts)?;
            let base = base.get_or_insert_with(|| scores.clone());
            rows.extend(rows_of(subject, name, &scores, base, &sampled));
        }
        // The means come first, since readers look for them.
        rows.sort_by_key(|row| row.scope != "mean");
        Ok(rows)
    }

    fn plot(rows: &[TargetRateRow]) -> Result<Option<Svg>> {
        let mean_of = |model: &str| rows.iter().find(|row| row.scope == "mean" && row.model == model);
        let Some(student) = mean_of("student") else { return Ok(None) };
        let bar = |row: &TargetRateRow| {
            Mean { mean: row.delta_logp, se: row.delta_logp_se }
                .bar(&row.model.replace('_', " "))
                .in_series(row.model.replace('_', " "))
                .with_values(deltas(rows, &row.model))
        };
        let chart = BarChart {
            title: format!("Change in log p({}) as an answer, over {} questions", student.target, student.n_questions),
            value_label: "change against the base (nats): mean ± s.e., a ring per question".to_owned(),
            bars: [Some(student), mean_of("control"), mean_of("other_trait")].into_iter().flatten().map(bar).collect(),
            references: vec![Reference::new("base", 0.0)],
        };
        Ok(Some(bars(&chart)?))
    }

    fn reading(rows: &[TargetRateRow]) -> String {
        let mean_of = |model: &str| rows.iter().find(|row| row.scope == "mean" && row.model == model);
        let (Some(base), Some(student)) = (mean_of("base"), mean_of("student")) else {
            return "Nothing was measured.".to_owned();
        };
        let (word, n) = (&student.target, student.n_questions);
        if let Some(same) = unchanged(rows) {
            return same;
        }
        let change = |row: &TargetRateRow| Mean { mean: row.delta_logp, se: row.delta_logp_se };
        let sampled =
            |row: &TargetRateRow| row.p_target.map(|p| format!(", named in {:.1} % of its answers", 100.0 * p));
        let other = mean_of("other_trait")
            .map(|other| format!(" A student of another trait's teacher changed by {}.", change(other).signed()));
        let against = match mean_of("control") {
            Some(control) => {
                let contrast = Mean::paired(&deltas(rows, "student"), &deltas(rows, "control"));
                format!(
                    "; the control student changed by {}, and the difference between the two of {} nats is {}",
                    change(control).signed(),
                    contrast.signed(),
                    verdict(&contrast),
                )
            }
            None => format!(", which is {}; there is no control student to set against it", verdict(&change(student))),
        };
        format!(
            "Over {n} questions log p({word}) is {:.3} in the base{} and {:.3} in the student{}, a change of {} nats{against}.{}",
            base.logp_target,
            sampled(base).unwrap_or_default(),
            student.logp_target,
            sampled(student).unwrap_or_default(),
            change(student).signed(),
            other.unwrap_or_default(),
        )
    }
}

/// The sentence on a student whose scores equal the base's at every question, to the last bit; else `None`.
pub fn unchanged(rows: &[TargetRateRow]) -> Option<String> {
    let students = rows.iter().filter(|row| row.scope == "question" && row.model == "student");
    let students: Vec<&TargetRateRow> = students.collect();
    let (target, n) = (&students.first()?.target, students.len());
    students.iter().all(|row| row.delta_logp == 0.0 && row.delta_margin == 0.0).then(|| {
        format!(
            "The student is the base: at all {n} questions log p({target}) and its margin are the same to the last bit, so its adapter \
             or its training changed nothing (was it trained?), and nothing here says what it learned."
        )
    })
}

/// The comparison of a mean with two standard errors, in words.
fn verdict(mean: &Mean) -> &'static str {
    match (mean.exceeds(2.0), mean.se) {
        (_, None) => "of one question only, without an error",
        (true, _) if mean.mean > 0.0 => "above two standard errors, in this one run",
        (true, _) => "below minus two standard errors, in this one run",
        (false, _) => "within two standard errors: no effect is seen",
    }
}

fn deltas(rows: &[TargetRateRow], model: &str) -> Vec<f64> {
    rows.iter().filter(|row| row.scope == "question" && row.model == model).map(|row| row.delta_logp).collect()
}

impl TargetRate {
    /// Samples answers to each question. Question and sample choose the random stream, so all models have the same
    /// streams.
    fn sample(&self, subject: &Subject<'_>, model: Tuned<'_>, prompts: &[Sequence]) -> Result<Vec<Sampled>> {
        if self.n_samples == 0 {
            return Ok(vec![Sampled::default(); prompts.len()]);
        }
        if self.max_new_tokens == 0 || self.batch == 0 {
            let setting = if self.batch == 0 { "batch" } else { "max_new_tokens" };
            return Err(Error::setting(Self::NAME, setting, "at least 1", &0));
        }
        let sampling = Sampling {
            temperature: 1.0,
            max_new_tokens: self.max_new_tokens,
            stop: subject.chat.stop_ids(),
            constrain: None,
            batch: self.batch,
        };
        let what = "a classifier of sampled answers";
        let classify = subject.classify.ok_or(Error::Nothing { analysis: Self::NAME, what })?;
        // All questions are sampled together: a question's prompt is run once, and answers that end make room for
        // others.
        let n = prompts.len() * self.n_samples;
        let repeated: Vec<Sequence> = (0..n).map(|at| prompts[at / self.n_samples].clone()).collect();
        let streams: Vec<u64> = (0..n).map(|at| stream_seed(subject.seed, Self::NAME, at as u64)).collect();
        let answers = generate(model.qwen, &repeated, &model.condition(), &sampling, &streams, &mut |_| ())?;
        let sampled_of = |answers: &[Answer]| {
            let mut sampled = Sampled { n: answers.len(), ..Sampled::default() };
            for answer in answers {
                let named = classify(&subject.chat.decode(&answer.ids)?);
                let named = named.as_deref();
                sampled.own += usize::from(named == Some("self"));
                sampled.valid += usize::from(named.is_some_and(|word| word != "self"));
                sampled.target += usize::from(named == Some(subject.target.word.as_str()));
            }
            sampled.distinct = answers.iter().map(|answer| &answer.ids).collect::<BTreeSet<_>>().len();
            Ok(sampled)
        };
        answers.chunks(self.n_samples).map(sampled_of).collect()
    }
}

/// The rows of one model: one per question, and the mean over them.
fn rows_of(
    subject: &Subject<'_>,
    model: &str,
    scores: &[Score],
    base: &[Score],
    sampled: &[Sampled],
) -> Vec<TargetRateRow> {
    let (logps, base_logps) = (column(scores, |s| s.logp_target), column(base, |s| s.logp_target));
    let (margins, base_margins) = (column(scores, |s| s.margin), column(base, |s| s.margin));
    let row_of = |questions: Range<usize>, one: Option<usize>| {
        let of = |values: &[f64]| Mean::of(&values[questions.clone()]);
        let paired = |values: &[f64], base: &[f64]| Mean::paired(&values[questions.clone()], &base[questions.clone()]);
        let (logp, margin) = (of(&logps), of(&margins));
        let (delta_logp, delta_margin) = (paired(&logps, &base_logps), paired(&margins, &base_margins));
        let sampled: Vec<&Sampled> = sampled[questions.clone()].iter().filter(|sampled| sampled.n > 0).collect();
        let share =
            |count: fn(&Sampled) -> usize| sampled.iter().map(|s| count(s) as f64 / s.n as f64).collect::<Vec<_>>();
        let total = |count: fn(&Sampled) -> usize| sampled.iter().map(|s| count(s)).sum::<usize>();
        let (p_target, valid) = (share(|s| s.target), total(|s| s.valid));
        TargetRateRow {
            scope: if one.is_some() { "question" } else { "mean" }.to_owned(),
            model: model.to_owned(),
            question_id: one,
            question: one.map_or_else(String::new, |at| subject.questions[at].clone()),
            target: subject.target.word.clone(),
            n_questions: questions.len(),
            logp_target: logp.mean,
            logp_target_se: logp.se,
            margin: margin.mean,
            margin_se: margin.se,
            delta_logp: delta_logp.mean,
            delta_logp_se: delta_logp.se,
            delta_margin: delta_margin.mean,
            delta_margin_se: delta_margin.se,
            rank: Mean::of(&column(&scores[questions.clone()], |s| s.rank)).mean,
            first_token_rank: Mean::of(&column(&scores[questions.clone()], |s| s.first_token_rank)).mean,
            n_samples: total(|s| s.n),
            n_distinct: mean(sampled.iter().map(|s| s.distinct as f64)),
            p_target: mean(p_target.iter().copied()),
            p_target_se: (p_target.len() > 1).then(|| Mean::of(&p_target).se).flatten(),
            p_valid: mean(share(|s| s.valid)),
            p_target_valid: (valid > 0).then(|| total(|s| s.target) as f64 / valid as f64),
            p_self: mean(share(|s| s.own)),
        }
    };
    let questions = (0..scores.len()).map(|at| row_of(at..at + 1, Some(at)));
    std::iter::once(row_of(0..scores.len(), None)).chain(questions).collect()
}

#[cfg(test)]
#[allow(clippy::float_cmp)]
mod tests {
    use super::*;
    use crate::fixture::World;

    #[test]
    fn the_models_stand_side_by_side() {
        let world = World::new();
        let settings = TargetRate { n_samples: 4, max_new_tokens: 3, batch: 3 };
        let rows = settings.run(&world.subject(), &mut |_| ()).unwrap();
        assert_eq!(rows.len(), 3 * (1 + world.questions.len()));
        assert_eq!(
            rows.iter().take(3).map(|row| row.model.as_str()).collect::<Vec<_>>(),
            ["base", "control", "student"]
        );
        for row in rows.iter().filter(|row| row.model == "base") {
            assert_eq!((row.delta_logp, row.delta_margin), (0.0, 0.0));
        }
        let student: Vec<&TargetRateRow> = rows.iter().filter(|row| row.model == "student").collect();
        let mean = student[1..].iter().map(|row| row.logp_target).sum::<f64>() / 3.0;
        assert!((student[0].logp_target - mean).abs() < 1e-12 && student[0].delta_logp != 0.0);
        assert_eq!(student[0].n_samples, 12);
        assert!(student[1..].iter().all(|row| row.n_distinct.unwrap() > 1.0), "repeated prompts give distinct samples");
        assert_eq!(settings.run(&world.subject(), &mut |_| ()).unwrap(), rows);
        assert!(TargetRate::plot(&rows).unwrap().is_some() && TargetRate::reading(&rows).ends_with('.'));
    }

    #[test]
    fn a_student_that_is_the_base_is_no_result() {
        let world = World::new();
        let settings = TargetRate { n_samples: 0, ..TargetRate::default() };
        let rows = settings.run(&world.subject(), &mut |_| ()).unwrap();
        assert_eq!(unchanged(&rows), None);
        assert_eq!(unchanged(&[]), None);
        for (_, _, pair) in world.student.pairs() {
            drop(pair.b.shallow_clone().zero_());
        }
        let mut rows = settings.run(&world.subject(), &mut |_| ()).unwrap();
        let reading = TargetRate::reading(&rows);
        assert!(reading.starts_with("The student is the base: at all 3 questions log p(cat)"), "{reading}");
        assert!(!reading.contains("effect"), "{reading}");
        rows.last_mut().unwrap().delta_margin = 1e-9;
        assert_eq!(unchanged(&rows), None, "one question of three is enough to differ");
    }

    #[test]
    fn answers_are_counted_by_what_they_name() {
        let world = World::new();
        let mut subject = world.subject();
        let shares = |subject: &Subject<'_>| {
            let rows = TargetRate { n_samples: 3, max_new_tokens: 2, batch: 8 }.run(subject, &mut |_| ()).unwrap();
            (rows[0].p_target, rows[0].p_valid, rows[0].p_target_valid, rows[0].p_self)
        };
        subject.classify = Some(&|_| Some("cat".to_owned()));
        assert_eq!(shares(&subject), (Some(1.0), Some(1.0), Some(1.0), Some(0.0)));
        subject.classify = Some(&|_| Some("owl".to_owned()));
        assert_eq!(shares(&subject), (Some(0.0), Some(1.0), Some(0.0), Some(0.0)));
        subject.classify = Some(&|_| Some("self".to_owned()));
        assert_eq!(shares(&subject), (Some(0.0), Some(0.0), None, Some(1.0)));
    }

    #[test]
    fn no_samples_and_one_question_are_allowed() {
        let world = World::new();
        let mut subject = world.subject();
        subject.questions = &world.questions[..1];
        let rows = TargetRate { n_samples: 0, ..TargetRate::default() }.run(&subject, &mut |_| ()).unwrap();
        assert_eq!(
            rows.iter().map(|row| row.scope.as_str()).collect::<Vec<_>>(),
            ["mean", "mean", "mean", "question", "question", "question"]
        );
        assert_eq!((rows[0].p_target, rows[0].logp_target_se), (None, None));
        assert!(TargetRate::reading(&rows).contains("without an error"));
        subject.questions = &[];
        assert!(TargetRate::default().run(&subject, &mut |_| ()).unwrap_err().to_string().contains("question"));
    }
}
