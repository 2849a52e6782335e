//! The program's output: results on stdout; progress on stderr, as bars and lines. Bars are drawn only on a terminal.

use std::io::{IsTerminal, Write, stderr};
use std::sync::LazyLock;
use std::time::Duration;

use anyhow::Result;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

/// All bars, so that those of several threads are drawn below each other, and lines above them.
static BARS: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);

/// Prints a line of progress on stderr.
pub fn say(line: impl AsRef<str>) {
    #[expect(clippy::print_stderr, reason = "the one place that speaks while work goes on")]
    BARS.suspend(|| eprintln!("{}", line.as_ref()));
}

/// Prints a command's result on stdout, without colours if stdout has none. A reader that has closed the pipe is not an
/// error.
pub fn print(text: &str) -> Result<()> {
    match anstream::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        written => Ok(written?),
    }
}

/// Prints remarks on something that was loaded, such as a folder, in a line each.
pub fn note(what: &str, remarks: &[String]) {
    for remark in remarks {
        say(format!("note: {what}: {remark}"));
    }
}

/// A bar with rate and remaining time, or an invisible one if stderr is not a terminal.
pub fn bar(what: &str, length: u64) -> ProgressBar {
    if !stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = BARS.add(ProgressBar::new(length).with_message(what.to_owned()));
    if let Ok(style) = ProgressStyle::with_template("{msg:24} {wide_bar} {pos}/{len}  {per_sec}  {eta} left  {prefix}")
    {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(500));
    bar
}

/// A spinner with the name of the current work.
pub fn spinner(what: &str) -> ProgressBar {
    if !stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let spinner = BARS.add(ProgressBar::new_spinner().with_message(what.to_owned()));
    spinner.enable_steady_tick(Duration::from_millis(200));
    spinner
}
