//! The table `[measure]`: the analyses and their settings.

use std::fmt;
use std::str::FromStr;

use analyses::direction::Direction;
use analyses::divergence::Divergence;
use analyses::gradients::Gradients;
use analyses::interventions::Interventions;
use analyses::ledger::Ledger;
use analyses::lens::Lens;
use analyses::position_scan::PositionScan;
use analyses::steering::Steering;
use analyses::target_rate::TargetRate;
use analyses::token_ablation::TokenAblation;
use anyhow::{Result, bail, ensure};
use hooks::Gate;
use serde::{Deserialize, Serialize};

use super::range::at_least_one;

/// The analyses and their settings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Measure {
    /// The analyses, in the order in which they run.
    pub analyses: Vec<AnalysisName>,
    /// The context of the questions; if left out, the student's.
    pub context: Option<String>,
    /// Largest number of questions.
    pub n_questions: usize,
    /// Whether a sentence with numbers precedes each question.
    pub numbers_prefix: bool,
    /// An arm whose student learned another trait. Its answers and its direction are compared with the student's.
    pub other_trait_arm: Option<String>,
    /// Settings of the target rate.
    pub target_rate: TargetRate,
    /// Settings of the token ablation.
    pub token_ablation: TokenAblation,
    /// Settings of the position scan.
    pub position_scan: PositionScan,
    /// Settings of the learned direction.
    pub direction: Direction,
    /// Settings of steering.
    pub steering: Steering,
    /// Settings of the interventions.
    pub interventions: Interventions,
    /// Settings of the divergence.
    pub divergence: Divergence,
    /// Settings of the gradients.
    pub gradients: Gradients,
    /// Settings of the lens.
    pub lens: Lens,
    /// Settings of the ledger.
    pub ledger: Ledger,
}

impl Default for Measure {
    fn default() -> Self {
        Self {
            analyses: AnalysisName::ALL.into_iter().filter(|name| !name.is_asked_for()).collect(),
            context: None,
            n_questions: 50,
            numbers_prefix: false,
            other_trait_arm: None,
            target_rate: TargetRate::default(),
            token_ablation: TokenAblation::default(),
            position_scan: PositionScan::default(),
            direction: Direction::default(),
            steering: Steering::default(),
            interventions: Interventions::default(),
            divergence: Divergence::default(),
            gradients: Gradients::default(),
            lens: Lens::default(),
            ledger: Ledger::default(),
        }
    }
}

/// An analysis by its name on the command line, which is also its folder in a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AnalysisName {
    /// The probability of the target as an answer: the effect.
    TargetRate,
    /// The effect per gate.
    TokenAblation,
    /// The effect per single position of the prompt.
    PositionScan,
    /// The mean difference of student and base in the residual stream.
    Direction,
    /// The effect of adding the direction, or of taking it out.
    Steering,
    /// The effect under named lists of edits.
    Interventions,
    /// Digits at which teacher and base disagree.
    Divergence,
    /// Gradient norms at divergent and other digits.
    Gradients,
    /// What the residual stream says after each block.
    Lens,
    /// The change of the trait, booked to the tokens that were learned from. It repeats the training.
    Ledger,
}

impl AnalysisName {
    /// All analyses, in the order in which they run.
    pub const ALL: [Self; 10] = [
        Self::TargetRate,
        Self::TokenAblation,
        Self::PositionScan,
        Self::Direction,
        Self::Steering,
        Self::Interventions,
        Self::Divergence,
        Self::Gradients,
        Self::Lens,
        Self::Ledger,
    ];

    /// The name as configs and commands spell it.
    pub fn name(self) -> &'static str {
        [
            "target_rate",
            "token_ablation",
            "position_scan",
            "direction",
            "steering",
            "interventions",
            "divergence",
            "gradients",
            "lens",
            "ledger",
        ][self as usize]
    }
}

impl AnalysisName {
    /// Whether it runs only where it is named: the ledger takes several trainings' time, and the lens reads what no other
    /// analysis needs.
    fn is_asked_for(self) -> bool {
        matches!(self, Self::Lens | Self::Ledger)
    }
}

impl fmt::Display for AnalysisName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for AnalysisName {
    type Err = hooks::Error;

    fn from_str(name: &str) -> hooks::Result<Self> {
        Self::ALL.into_iter().find(|analysis| analysis.name() == name).ok_or_else(|| hooks::Error::UnknownName {
            what: "analysis",
            found: name.to_owned(),
            choices: Self::ALL.map(Self::name).join(", "),
        })
    }
}

impl Measure {
    pub(super) fn check(&self) -> Result<()> {
        let known = AnalysisName::ALL.map(AnalysisName::name).join(", ");
        ensure!(!self.analyses.is_empty(), "measure.analyses is empty, expected some of {known}");
        at_least_one("measure.n_questions", self.n_questions)?;
        at_least_one("measure.direction.n_prompts", self.direction.n_prompts)?;
        at_least_one("measure.steering.n_prompts", self.steering.n_prompts)?;
        at_least_one("measure.divergence.n_rows", self.divergence.n_rows)?;
        at_least_one("measure.target_rate.max_new_tokens", self.target_rate.max_new_tokens)?;
        ensure!(
            !self.token_ablation.gates.is_empty(),
            "measure.token_ablation.gates is empty, expected gates such as {}",
            Gate::SYNTAX
        );
        let coefficients = &self.steering.coefficients;
        ensure!(!coefficients.is_empty(), "measure.steering.coefficients is empty, expected at least one number");
        if let Some(bad) = coefficients.iter().find(|coefficient| !coefficient.is_finite()) {
            bail!("an entry of measure.steering.coefficients is {bad}, expected a finite number");
        }
        Ok(())
    }
}
