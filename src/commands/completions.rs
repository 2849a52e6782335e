//! Prints completions for a shell, to be put where the shell looks for them.

use crate::output::progress::print;
use anyhow::Result;
use clap::{Args, Command};
use clap_complete::{Shell, generate};

/// Prints completions for a shell.
#[derive(Args, Debug)]
#[command(after_help = "Where the file goes (a new shell reads it):
  bash        ~/.local/share/bash-completion/completions/undertone
  zsh         ~/.zfunc/_undertone, with fpath+=~/.zfunc before compinit in .zshrc
  fish        ~/.config/fish/completions/undertone.fish
  elvish      ~/.config/elvish/lib/undertone.elv, with `use undertone` in rc.elv
  powershell  any .ps1 that $PROFILE runs

Examples:
  undertone completions bash \\
    > ~/.local/share/bash-completion/completions/undertone
  undertone completions zsh > ~/.zfunc/_undertone
  undertone completions fish > ~/.config/fish/completions/undertone.fish")]
pub struct CompletionsArgs {
    /// The shell.
    #[arg(value_enum)]
    shell: Shell,
}

/// Prints the script of completions for `command`.
pub fn run(args: &CompletionsArgs, mut command: Command) -> Result<()> {
    let mut script = Vec::new();
    let name = command.get_name().to_owned();
    generate(args.shell, &mut command, name, &mut script);
    print(&String::from_utf8(script)?)
}
