//! Serves the page that shows a student's adapter token by token.

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;

use anyhow::{Result, ensure};
use clap::Args;

use crate::hinted;
use crate::look::{Address, serve};
use crate::stages::run_dir::RunDir;

/// Opens a run in the browser: switch its student's adapter on and off at single tokens of a chat, and see what the
/// model then says.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  undertone look runs/demo")]
pub struct LookArgs {
    /// The run's folder.
    run: PathBuf,
    /// The port of the page; 0 is any that is free.
    #[arg(long, default_value_t = 0)]
    port: u16,
    /// The address to listen at. Any but this machine's own needs --i-know.
    #[arg(long, default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST))]
    host: IpAddr,
    /// Listens at an address that other machines reach: who knows the page's address can ask the models.
    #[arg(long)]
    i_know: bool,
}

/// Serves the page until the program is ended.
pub fn run(args: &LookArgs) -> Result<()> {
    ensure!(
        args.host.is_loopback() || args.i_know,
        hinted!("other machines reach {}, and could ask the models", args.host; "--i-know listens there all the same")
    );
    ensure!(
        !args.host.is_unspecified(),
        hinted!("--host {} is every address of this machine, expected one of them", args.host; "or leave it out, and forward a port to it: ssh -L PORT:127.0.0.1:PORT MACHINE")
    );
    serve(RunDir::open(&args.run)?, Address { host: args.host, port: args.port })
}
