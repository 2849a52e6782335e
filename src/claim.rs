//! Tests published claims. `file` is a claim's TOML; `study` is the claim at one size; `run` trains its students, and
//! `measure`, `ask` and `booked` make the table of outcomes. Everything else is computed from that table: the students that a
//! measurement selects (`chosen`), the estimates (`estimate`), the verdict (`verdict`), figures, tables for plots, and
//! the page.

mod ask;
mod booked;
mod chosen;
mod estimate;
mod figures;
mod file;
mod measure;
mod outcome;
mod page;
mod plan;
pub mod run;
mod study;
pub mod tables;
mod verdict;
pub mod verdict_table;

pub use chosen::with_chosen;
pub use file::{
    Chosen, Claim, EVERYWHERE, EvalCondition, Figure, FigureKind, Kind, Over, RankAxis, Role, StudentNumber, THROUGH,
    Test,
};
pub use outcome::{Measurement, OutcomeRow, Quantity};
pub use study::{Size, Study, Unit, UnitStudent};
pub use verdict::{ALL, Outcome, TestRow, Verdict, Word, tests};
