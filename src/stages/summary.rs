//! The last lines that a run prints: one for each question that it answered, from the CSV files.

use analyses::divergence::DivergenceSummaryRow;
use analyses::position_scan::PositionScanRow;
use analyses::steering::SteeringRow;
use analyses::target_rate::{TargetRateRow, unchanged};
use analyses::token_ablation::{TokenAblationRow, unselected};
use anyhow::Result;

use crate::experiment::{AnalysisName, Experiment, STUDENT};
use crate::output::publish::read_csv_if_there as there;
use crate::stages::arm_table::{ArmRow, FEWEST_FOR_A_SHAPE, Group, parted};
use crate::stages::run_dir::RunDir;
use crate::stages::teacher::TeacherRow;

/// The lines: one on the data and the training, and one for each kind of question that was measured.
pub fn summary(run: &RunDir, experiment: &Experiment) -> Result<Vec<String>> {
    let word = &experiment.target.word;
    let rates: Vec<TargetRateRow> = there(&run.rows(AnalysisName::TargetRate))?;
    let lines = [
        made(run, &there(&run.teacher_csv())?, word)?,
        effect(&rates, word),
        controls(&there(&run.arms_rows())?),
        tokens(&there(&run.rows(AnalysisName::TokenAblation))?, &there(&run.rows(AnalysisName::PositionScan))?, word),
        direction(run)?,
    ];
    Ok(lines.into_iter().flatten().collect())
}

fn made(run: &RunDir, teacher: &[TeacherRow], word: &str) -> Result<Option<String>> {
    let p = |model: &str| teacher.iter().find(|row| row.scope == "mean" && row.model == model).map(|row| row.p_target);
    let (Some(base), Some(taught)) = (p("base"), p("teacher")) else { return Ok(None) };
    let rows: Vec<crate::training::step_log::StepRow> = there(&run.train_csv())?;
    let learned = rows.last().map_or(String::new(), |step| {
        format!("; the student learned from its numbers in {} steps, and from nothing else", step.step)
    });
    Ok(Some(format!(
        "The teacher answers {word:?} with probability {taught:.2}, where the base does with {base:.2}{learned}."
    )))
}

fn effect(rates: &[TargetRateRow], word: &str) -> Option<String> {
    let mean = |model: &str| rates.iter().find(|row| row.scope == "mean" && row.model == model);
    let (base, student) = (mean("base")?, mean("student")?);
    if let Some(same) = unchanged(rates) {
        return Some(same);
    }
    let p = |model: &str| {
        let of = || rates.iter().filter(|row| row.scope == "question" && row.model == model);
        of().map(|row| row.logp_target.exp()).sum::<f64>() / of().count() as f64
    };
    let control = mean("control").map_or("without a control student".to_owned(), |control| {
        format!("a student of the untouched base's numbers {:.2}", p(&control.model))
    });
    Some(format!(
        "The student now answers {word:?} with probability {:.2} (the base {:.2}, {control}): {:+.2} nats.",
        p(&student.model),
        p(&base.model),
        student.delta_logp,
    ))
}

fn controls(arms: &[ArmRow]) -> Option<String> {
    let student = arms.iter().find(|row| row.arm == STUDENT)?;
    let (ranked, single) = parted(arms);
    let others = single.iter().filter(|group| group.rows[0].target == student.target);
    let others: Vec<String> = others.map(|group| format!("{} {}", group.arm, group.effect())).collect();
    let shape = ranked.iter().find(|(_, groups)| groups.iter().all(|group| group.rows.len() >= FEWEST_FOR_A_SHAPE));
    let shape = shape.map(|(arm, groups)| {
        let at = |group: &Group<'_>| format!("{} at rank {}", group.effect(), group.rank.unwrap_or_default());
        format!("; {arm:?} has {}", groups.iter().map(at).collect::<Vec<_>>().join(", "))
    });
    Some(format!(
        "Its margin (log p against the other answers' mean) moves by {:+.3} nats; other students' (one each, unless it says otherwise): {}{}.",
        student.delta_margin,
        others.join(", "),
        shape.unwrap_or_default()
    ))
}

fn tokens(gates: &[TokenAblationRow], scan: &[PositionScanRow], word: &str) -> Option<String> {
    let row = |gate: &str| gates.iter().find(|row| row.model == "student" && row.gate == gate);
    let lacking = match unselected(gates)[..] {
        [] => String::new(),
        ref gates => {
            format!(" The questions' prompts have no token for {}, so these gates were not measured.", gates.join(", "))
        }
    };
    let left = |gate: &str| row(gate)?.recovered_logp;
    let (Some(only), Some(except)) = (left("only:system"), left("except:system")) else {
        let ungated = row("everywhere")?;
        let too_small = ungated.recovered_logp.is_none().then(|| {
            format!(
                " The change in log p({word}), {:+.2} nats, is not three standard errors clear of zero: where it sits cannot be said.",
                ungated.delta_logp.unwrap_or_default()
            )
        });
        let said = too_small.unwrap_or_default() + &lacking;
        return (!said.is_empty()).then(|| said.trim_start().to_owned());
    };
    let most = scan.iter().filter(|row| !row.class.is_empty());
    let most = most.min_by(|a, b| a.delta_margin_except.total_cmp(&b.delta_margin_except));
    let most = most.map(|row| {
        let token = if row.token.trim().is_empty() { row.token.as_str() } else { row.token.trim() };
        format!("; the one token it misses most is {token:?} ({})", row.class)
    });
    Some(format!(
        "With the adapter at the system prompt alone {:.0} % of the change in log p({word}) is left, everywhere else {:.0} %{}.{lacking}",
        100.0 * only,
        100.0 * except,
        most.unwrap_or_default()
    ))
}

fn direction(run: &RunDir) -> Result<Option<String>> {
    let steering: Vec<SteeringRow> = there(&run.rows(AnalysisName::Steering))?;
    let learned = || steering.iter().filter(|row| row.kind == "learned");
    let is_some = |row: &&SteeringRow| row.vector_norm > 0.0;
    let Some(best) = learned().filter(is_some).max_by(|a, b| a.delta_logp.abs().total_cmp(&b.delta_logp.abs())) else {
        let none =
            "Its direction is zero after each block that was steered after, so there is nothing to add to the base.";
        return Ok(learned().next().map(|_| none.to_owned()));
    };
    let place = (best.layer, best.coefficient);
    let same = |kind: &str| steering.iter().find(|row| row.kind == kind && (row.layer, row.coefficient) == place);
    let random = same("random").and_then(|row| {
        let (n, spread, as_far) = (row.n_random?, row.delta_logp_sd?, best.rank_logp? - 1);
        Some(format!("{n} random ones {:+.2} ± {spread:.2}, {as_far} of them above it", row.delta_logp))
    });
    let named = [("control_student", "the control's"), ("other_trait", "another trait's")];
    let others = named.iter().filter_map(|(kind, name)| same(kind).map(|row| format!("{name} {:+.2}", row.delta_logp)));
    let beside: Vec<String> = random.into_iter().chain(others).collect();
    let divergence: Vec<DivergenceSummaryRow> = there(&run.analysis(AnalysisName::Divergence).join("summary.csv"))?;
    let digits = divergence.iter().find(|row| row.group == "digits");
    let digits = digits.map(|row| format!("; teacher and base diverge at {:.0} % of the digits", 100.0 * row.nief));
    Ok(Some(format!(
        "Its direction, added to the base at {} times its length after block {} (the largest of the pushes tried), moves log p \
         by {:+.2} nats ({}){}.",
        best.coefficient.unwrap_or(1.0),
        best.layer,
        best.delta_logp,
        beside.join(", "),
        digits.unwrap_or_default()
    )))
}
