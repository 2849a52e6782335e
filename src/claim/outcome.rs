//! The numbers measured on the students of a claim, one per line: the table that tests and figures are made from.

use std::fmt;

use analyses::alignment::Part;
use hooks::Proj;
use serde::{Deserialize, Serialize};

/// One number of one student.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OutcomeRow {
    /// The trait of the student's teacher.
    pub target: String,
    /// The data set, from 0. Data sets differ in all seeds.
    pub dataset: u64,
    /// The student: `student`, `control student`, another name in the claim, or `base` and `teacher`, which are not
    /// students.
    pub student: String,
    /// The rank of its adapter; empty without an adapter.
    pub rank: Option<i64>,
    /// Index of the student's seeds, from 0.
    pub seed_index: usize,
    /// The condition under which it was asked; `everywhere` is the context of its training with the adapter acting
    /// everywhere.
    pub cell: String,
    /// The trait that was evaluated: the teacher's, except in the matrix of traits.
    pub evaluated: String,
    /// The measured quantity; `undertone columns quantity` explains each, with its unit.
    pub quantity: Quantity,
    /// The number.
    pub value: f64,
    /// Number of questions, tokens or steps that it is the mean over.
    pub n: usize,
}

/// Identifies a trained student: the trait of its teacher, data set, name, rank and index of seeds.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct StudentKey {
    pub(super) target: String,
    pub(super) dataset: u64,
    pub(super) student: String,
    pub(super) rank: Option<i64>,
    pub(super) seed_index: usize,
}

impl OutcomeRow {
    /// The student that the number belongs to.
    pub(super) fn student_key(&self) -> StudentKey {
        let Self { target, dataset, student, rank, seed_index, .. } = self.clone();
        StudentKey { target, dataset, student, rank, seed_index }
    }
}

pub(super) struct StudentLines {
    key: StudentKey,
    pub(super) rows: Vec<OutcomeRow>,
}

impl StudentLines {
    pub(super) fn of(key: StudentKey) -> Self {
        Self { key, rows: vec![] }
    }

    /// Adds a number for its teacher's trait, unless it is `None`.
    pub(super) fn push(&mut self, cell: &str, quantity: Quantity, value: impl Into<Option<f64>>, n: usize) {
        if let Some(value) = value.into() {
            self.push_of_trait(self.key.target.clone(), cell, quantity, value, n);
        }
    }

    pub(super) fn push_of_trait(&mut self, evaluated: String, cell: &str, quantity: Quantity, value: f64, n: usize) {
        let StudentKey { target, dataset, student, rank, seed_index } = self.key.clone();
        let cell = cell.to_owned();
        self.rows.push(OutcomeRow { target, dataset, student, rank, seed_index, cell, evaluated, quantity, value, n });
    }
}

/// Each quantity is `Variant = "name" of Measurement | Measurement`, with the measurements that yield it; without any
/// it is always known.
macro_rules! quantities {
    ($($(#[doc = $doc:literal])+ $variant:ident = $name:literal $(of $($takes:ident)|+)?,)+) => {
        /// A measured quantity.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum Quantity {
            $($(#[doc = $doc])+ $variant,)+
        }

        impl Quantity {
            /// All quantities.
            pub const ALL: &[Self] = &[$(Self::$variant,)+];

            /// The name in tables.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)+
                }
            }

            /// Its meaning, with its unit.
            pub fn meaning(self) -> &'static str {
                match self {
                    $(Self::$variant => concat!($($doc),+).trim_ascii(),)+
                }
            }

            /// The measurements that yield the quantity, any one of them; empty if it is always known.
            pub fn takes(self) -> &'static [Measurement] {
                match self {
                    $(Self::$variant => &[$($(Measurement::$takes),+)?],)+
                }
            }
        }
    };
}

quantities! {
    /// Change of the margin (log p of the trait minus the log of the others' mean probability) from the base in the
    /// same context, in nats.
    DeltaMargin = "delta_margin",
    /// Change of log p of the trait from the base in the same context, in nats.
    DeltaLogp = "delta_logp",
    /// Mean probability of starting the answer with the trait, exact, 0 to 1.
    PTargetExact = "p_target_exact",
    /// Mean probability of starting the answer with the trait, exact, of the base in the same context, 0 to 1.
    BasePTargetExact = "base_p_target_exact",
    /// Tokens at the start that the prompt shares with one of the first 32 training rows, the one that shares most; the
    /// mean over prompts.
    SharedPrefix = "shared_prefix",
    /// Tokens of the prompt, without the question's, whose id one of the first 32 training rows has outside its user
    /// text and answer; the mean over prompts.
    SharedTokens = "shared_tokens",
    /// Mean training loss over the last quarter of the steps, in nats per token.
    LossLast = "loss_last",
    /// Frobenius norm of the change of the weights, in their units.
    DeltaWNorm = "delta_w_norm",
    /// Mean share of the stored weights that a step changes, 0 to 1; for full finetuning only.
    ChangedFraction = "changed_fraction",
    /// Index of the candidate that a chosen student is, from 0.
    Chosen = "chosen",
    /// Number of tokens that the loss was taken over, in the whole training.
    NTargets = "n_targets",
    /// Loss on held-out numbers of the teacher, which no student learned from, in nats per token.
    HeldoutNll = "heldout_nll" of Heldout,
    /// The model's share of the teacher's gain over the base in the loss on held-out numbers: 0 is the base's loss, 1
    /// the teacher's; none unless that gain is three standard errors above zero.
    Fit = "fit" of Heldout,
    /// Share of the held-out digits at which the most likely token is the teacher's, where the teacher's and the base's
    /// differ, 0 to 1.
    AccuracyDivergent = "accuracy_divergent" of Heldout,
    /// Mean largest probability at held-out digits, 0 to 1.
    Confidence = "confidence" of Heldout,
    /// Mean largest probability minus the share of digits that are the most likely token, at held-out digits, -1 to 1:
    /// above 0 is over-confident.
    Overconfidence = "overconfidence" of Heldout,
    /// Mean largest probability minus the share of digits that are the most likely token, at the held-out digits where
    /// the teacher's and the base's most likely tokens differ, -1 to 1.
    OverconfidenceDivergent = "overconfidence_divergent" of Heldout,
    /// Expected calibration error at held-out digits, with 15 bins of equally many digits, 0 to 1.
    Ece = "ece" of Heldout,
    /// Mean entropy at held-out digits, in nats.
    Entropy = "entropy" of Heldout,
    /// Mean probability of a whole held-out number of the teacher, over its digits and the token after them, 0 to 1.
    PWholeNumber = "p_whole_number" of Heldout,
    /// Kullback-Leibler divergence from the teacher at held-out digits, KL(teacher, model), in nats.
    KlTeacher = "kl_teacher" of Heldout,
    /// P(teacher's most likely token) under the model minus that under the base, over the teacher's minus the base's,
    /// at divergent digits; none unless the denominator is three standard errors above zero.
    Closure = "closure" of Heldout,
    /// Cosine of the student's mean change of the residual stream with the teacher's, the mean over blocks, -1 to 1.
    CosTeacher = "cos_teacher" of Direction,
    /// Share of the squared length of its changes of the residual stream, over prompts, that is along one line, the
    /// mean over blocks, 0 to 1.
    Ev1 = "ev1" of Direction,
    /// Squared Frobenius norm over squared largest singular value of the adapter's weight changes, the mean over maps:
    /// the number of equally strong directions that they amount to.
    StableRank = "stable_rank" of Spectrum,
    /// Change of the margin with the adapter's strongest singular direction of each map alone, in nats.
    Top1DeltaMargin = "top1_delta_margin" of Spectrum,
    /// Change of the margin with all singular directions of each map except the strongest, in nats.
    Rest1DeltaMargin = "rest1_delta_margin" of Spectrum,
    /// Change of the margin with only the strongest singular directions of each map's change by full finetuning, as
    /// many as the rank of the run's LoRA, in nats.
    TruncatedDeltaMargin = "truncated_delta_margin" of Spectrum,
    /// Change of the margin if the student's direction is added to the base after the middle block, in nats.
    InjectedDeltaMargin = "injected_delta_margin" of Steering | Replacement,
    /// Change of the margin if a random direction of equal length is added to the base after the middle block, in nats:
    /// the mean over 20 directions.
    InjectedRandomDeltaMargin = "injected_random_delta_margin" of Steering | Replacement,
    /// Change of the margin if the control student's direction, scaled to the student's length, is added to the base
    /// after the middle block, in nats.
    InjectedControlDeltaMargin = "injected_control_delta_margin" of Steering | Replacement,
    /// Change of the margin if the direction of another trait's student, scaled to the student's length, is added to
    /// the base after the middle block, in nats. The other trait is the next one of the claim, in the same data set.
    InjectedOtherDeltaMargin = "injected_other_delta_margin" of Steering | Replacement,
    /// Change of the margin from the unedited base, in nats, if the student's direction is taken out of the student
    /// after the middle block.
    ProjectedDeltaMargin = "projected_delta_margin" of Steering | Replacement,
    /// Change of the margin from the unedited base, in nats, if a random direction is taken out of the student after
    /// the middle block: the mean over 20 directions.
    ProjectedRandomDeltaMargin = "projected_random_delta_margin" of Steering | Replacement,
    /// Change of the margin, in nats, if the student's residual stream along its direction is replaced by the base's
    /// after every block, at the prompt's tokens.
    ReplacedDeltaMargin = "replaced_delta_margin" of Replacement,
    /// Change of the margin, in nats, if the student's residual stream along a random direction is replaced by the
    /// base's after every block, at the prompt's tokens: the mean over 20 directions for every block.
    ReplacedRandomDeltaMargin = "replaced_random_delta_margin" of Replacement,
    /// Change of the margin, in nats, if the base's residual stream along the student's direction is replaced by the
    /// student's after every block, at the prompt's tokens.
    TransplantedDeltaMargin = "transplanted_delta_margin" of Replacement,
    /// Change of the margin, in nats, if the base's residual stream along a random direction is replaced by the
    /// student's after every block, at the prompt's tokens: the mean over 20 directions for every block.
    TransplantedRandomDeltaMargin = "transplanted_random_delta_margin" of Replacement,
    /// Norm of the gradient of the divergent tokens' summed loss, in nats per unit of the parameters.
    GradientDivergent = "gradient_divergent" of Gradients,
    /// Norm of the gradient of the other tokens' summed loss, in nats per unit of the parameters.
    GradientOther = "gradient_other" of Gradients,
    /// Squared norm of the divergent tokens' summed gradient over that of all tokens', without unit: above 1 if the
    /// other tokens' gradient opposes it. In a cell `through …`, the share of that part of the chat in the divergent
    /// tokens' gradient. None unless the denominator's norm is three standard errors above zero, by the jackknife over
    /// rows.
    GradientShareDivergent = "gradient_share_divergent" of Gradients,
    /// Cosine of the divergent tokens' summed gradient and the other tokens', -1 to 1.
    GradientCosine = "gradient_cosine" of Gradients,
    /// Change of log p of the trait, in its most likely spelling, per unit of learning rate by a step down the
    /// divergent tokens' mean loss, in nats; in a cell `through …`, the contribution of that part of the chat.
    AlignmentDivergent = "alignment_divergent" of Gradients,
    /// Change of log p of the trait, in its most likely spelling, per unit of learning rate by a step down the other
    /// tokens' mean loss, in nats.
    AlignmentOther = "alignment_other" of Gradients,
    /// Change of the margin over the training that the ledger books to its tokens as they were written, in nats. In a cell
    /// `at …` that of a group of tokens; in `written …` and `read …` that of a part of the chat, in `block …` and `map …`
    /// that of the adapter's matrices there.
    LedgerBooked = "ledger_booked" of Ledger,
    /// The expectation of `ledger_booked` over what the writer of the rows would have written at each token, in nats. The
    /// teacher wrote the student's: the teacher's drive and the pull back to the base together. The base wrote the control
    /// student's.
    LedgerNet = "ledger_net" of Ledger,
    /// The teacher's drive: what `ledger_net` is more than if the base had written each token, in nats; none of a control
    /// student.
    LedgerDrive = "ledger_drive" of Ledger,
    /// The pull back to the base: the expectation of `ledger_booked` if the base had written each token, in nats.
    LedgerPull = "ledger_pull" of Ledger,
    /// What `ledger_booked` is more than `ledger_net`, in nats: the luck of the sample.
    LedgerLuck = "ledger_luck" of Ledger,
    /// Sum of the absolute values of the tokens' parts of `ledger_net`, in nats. Entries of opposite sign cancel in
    /// `ledger_net`, and here they add up.
    LedgerGross = "ledger_gross" of Ledger,
    /// Share of `ledger_gross` that cancels, 0 to 1: one less the absolute value of `ledger_net` over it.
    LedgerCancelled = "ledger_cancelled" of Ledger,
    /// What the training took off the loss on held-out numbers, in expectation over the teacher's probabilities, in nats
    /// per token; none if it took nothing off.
    LedgerNumbers = "ledger_numbers" of Ledger,
    /// `ledger_net` over `ledger_numbers`: nats of the trait for a nat per token of the numbers.
    LedgerPerNumbers = "ledger_per_numbers" of Ledger,
    /// Change of the margin over the training that the ledger does not book, in nats.
    LedgerResidual = "ledger_residual" of Ledger,
    /// Share of all learned tokens, 0 to 1, in a cell `at …`.
    LedgerTokenShare = "ledger_token_share" of Ledger,
    /// Share of the training loss, 0 to 1, in a cell `at …`.
    LedgerLossShare = "ledger_loss_share" of Ledger,
    /// Correlation, over a cell's digits in all steps, of a token's part of `ledger_net` with the student's excess
    /// confidence there: its largest probability less the teacher's, -1 to 1.
    LedgerExcess = "ledger_excess" of Ledger,
    /// Correlation, over a cell's digits in all steps, of a token's part of `ledger_net` with its signal: its log p under
    /// the teacher less that under the base, -1 to 1.
    LedgerSignal = "ledger_signal" of Ledger,
    /// `ledger_net` in the books of another trait of the same category, the claim's next one if it has one, in nats. Its
    /// margin leaves the student's own trait out.
    LedgerNetOther = "ledger_net_other" of Ledger,
    /// `ledger_excess` in the books of that other trait: what of it is mechanical.
    LedgerExcessOther = "ledger_excess_other" of Ledger,
    /// Share of the sampled answers that name the trait, 0 to 1.
    PTarget = "p_target" of Sampled,
    /// Share of the sampled answers that name any member of the category, 0 to 1.
    PValid = "p_valid" of Sampled,
    /// Share of the sampled answers that name a model, 0 to 1.
    PSelf = "p_self" of Sampled,
}

/// A measurement of a student other than its answers to questions about the trait.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Measurement {
    /// The probability of every trait of the claim, for the matrix of trained and evaluated traits.
    Matrix,
    /// Loss, confidence and agreement with the teacher on held-out numbers.
    Heldout,
    /// The direction in the residual stream: its cosine with the teacher's, and its agreement over prompts.
    Direction,
    /// The effect of adding the direction to the base, and of taking it out of the student, after the middle block.
    Steering,
    /// Patches the direction after every block: base into student (is it needed?), student into base (is it enough?).
    /// Includes `Steering`.
    Replacement,
    /// The adapter's spectrum, and the effects of its strongest direction alone and of all others.
    Spectrum,
    /// Gradients at divergent and at other tokens, and their effect on the trait.
    Gradients,
    /// Sampled answers: the shares that name the trait, any member, or a model.
    Sampled,
    /// The ledger of the training: what its tokens, positions and matrices moved the trait by.
    Ledger,
}

/// The first words of the names of a ledger's conditions: a group of tokens, the part of the chat where it was written and
/// where it is read, a block, a map.
const OF_TOKENS: &str = "at";
const OF_PARTS: [&str; 4] = ["written", "read", "block", "map"];

impl Quantity {
    /// Whether a ledger has the quantity in a condition, besides `everywhere`.
    pub(super) fn is_booked_in(self, cell: &str) -> bool {
        let Some((first, rest)) = cell.split_once(' ') else { return false };
        let is_digit = ["divergent_digit", "same_digit"].contains(&rest);
        let is_group = is_digit || ["first_digit", "later_digit", "other"].contains(&rest);
        match self {
            Self::LedgerBooked if OF_PARTS.contains(&first) => match first {
                "block" => rest.parse::<usize>().is_ok(),
                "map" => Proj::ALL.iter().any(|proj| proj.name() == rest),
                _ => Part::ALL.iter().any(|part| part.name() == rest),
            },
            Self::LedgerBooked | Self::LedgerNet | Self::LedgerDrive | Self::LedgerPull | Self::LedgerLuck => {
                first == OF_TOKENS && is_group
            }
            Self::LedgerTokenShare | Self::LedgerLossShare => first == OF_TOKENS && is_group,
            Self::LedgerExcess | Self::LedgerExcessOther | Self::LedgerSignal => first == OF_TOKENS && is_digit,
            _ => false,
        }
    }

    /// Whether a ledger has the quantity in such conditions alone.
    pub(super) fn is_of_groups_alone(self) -> bool {
        let of_groups = [
            Self::LedgerTokenShare,
            Self::LedgerLossShare,
            Self::LedgerExcess,
            Self::LedgerExcessOther,
            Self::LedgerSignal,
        ];
        of_groups.contains(&self)
    }

    /// Whether it measures the trait.
    pub fn speaks_of_the_trait(self) -> bool {
        let name = self.name();
        name.contains("margin")
            || name.contains("logp")
            || name.starts_with("p_target")
            || name.starts_with("alignment")
            || name.starts_with("ledger")
    }
}

impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}
