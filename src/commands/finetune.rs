//! Stage 2: the student learns the teacher's numbers, and a control student those of the untouched model.

use std::path::{Path, PathBuf};

use anyhow::Result;
use hooks::{Adapter, ModelFiles, Qwen};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use crate::dataset::Sample;
use crate::experiment::Method;
use crate::finetune::{Progress, StepRow, finetune_full, finetune_lora, first_and_last_quarter, save_full};
use crate::progress::{bar, say};
use crate::publish::CsvLog;
use crate::run_dir::RunDir;
use crate::side_by_side::{side_by_side, workers};
use crate::workbench::Workbench;

/// Writes `adapter/` and `train.csv`, and the same of the control student where the experiment has one. With `go_on`, a
/// finished student is kept, saying so.
pub fn stage(bench: &Workbench, run: &RunDir, go_on: bool) -> Result<()> {
    let (numbers, control) = bench.kept(run)?;
    let mut students = vec![("student", &numbers, run.adapter(), run.train_csv())];
    if bench.experiment.student.control {
        students.push(("control student", &control, run.control_adapter(), run.control_train_csv()));
    }
    let mut left = vec![];
    for job in students {
        if go_on && RunDir::stage_done(&job.3) {
            say(format!("finetune: {} is done already", job.0));
            continue;
        }
        // The log gets its name last: where it is not, the folder is what a broken-off run left.
        run.claim(&job.3)?;
        left.push(job);
    }
    let train =
        |bench: &Workbench, (who, samples, folder, log): &(&str, &Vec<Sample>, PathBuf, PathBuf)| -> Result<()> {
            say(format!("finetune: {}", student(bench, who, samples, folder, log)?));
            Ok(())
        };
    let workers = workers(bench.n_parameters(), left.len());
    if workers == 1 {
        return left.iter().try_for_each(|job| train(bench, job));
    }
    let experiment = &bench.experiment;
    side_by_side(&left, workers, |_, job| train(&Workbench::again(experiment.clone())?, job)).map(drop)
}

/// Trains the experiment's student on some samples, saves it in `folder`, and gives a line about it.
pub(super) fn student(bench: &Workbench, who: &str, samples: &[Sample], folder: &Path, log: &Path) -> Result<String> {
    let (settings, seeds) = (&bench.experiment.finetune, bench.experiment.seeds.finetune());
    let rows = bench.rows(samples)?;
    let mut csv = CsvLog::create(log)?;
    let bar = bar(who, settings.total_steps(rows.len()));
    let mut steps: Vec<StepRow> = Vec::new();
    let mut on_step = |row: &StepRow, progress: &Progress| {
        bar.set_length(progress.total_steps);
        bar.set_position(progress.step);
        bar.set_prefix(format!("loss {:.3}, {:.0} tokens/s", row.loss, progress.tokens_per_second));
        steps.push(row.clone());
        csv.push(row)
    };
    let is_digit = |id| bench.chat.is_digit(id);
    match bench.experiment.student.method {
        Method::Lora => {
            let mut rng = ChaCha8Rng::seed_from_u64(seeds.init);
            let lora = bench.experiment.student.lora();
            let adapter = Adapter::init(&lora, &bench.base.config, &mut rng, bench.base.device())?;
            finetune_lora(&bench.base, &adapter, &rows, &is_digit, settings, seeds, &mut on_step)?;
            adapter.save(folder, &bench.files.name)?;
        }
        Method::Full => {
            // Weights of its own: the base stays as it is.
            let files = ModelFiles::open(&bench.files.name)?;
            let model = Qwen::load(&files, bench.base.device(), bench.base.kind())?;
            finetune_full(&model, &rows, &is_digit, settings, seeds, &mut on_step)?;
            save_full(&model, &files, folder)?;
        }
    }
    bar.finish_and_clear();
    csv.finish()?;
    let (first, last) = first_and_last_quarter(&steps).unwrap_or((f64::NAN, f64::NAN));
    Ok(format!(
        "{who}: {} rows, loss {first:.3} in the first quarter of the steps and {last:.3} in the last, saved in {}",
        rows.len(),
        folder.display()
    ))
}
