//! The table of `--profile`: seconds, their share, the FLOPs that the mathematics needs, and these as a share of the
//! FLOPs that the machine could do in that time.

use anyhow::Result;
use hooks::profile::{Cost, Profile, product_rate};
use tch::{Device, Kind};

/// The table of a recording, for which the machine's rate is measured. Empty stages and kinds are left out.
pub fn table(profile: &Profile) -> Result<String> {
    let (device, kind) = profile.model.unwrap_or((Device::Cpu, Kind::Float));
    let rate = product_rate(device, kind, 0.5)?;
    let total = profile.seconds();
    let mut lines = vec![format!(
        "profile: {total:.2} s; of the rate: of {:.0} GFLOP/s, at which this machine multiplies large matrices ({device:?}, {kind:?}, {} threads, {})",
        rate / 1e9,
        tch::get_num_threads(),
        hooks::mkl::described()
    )];
    lines.push(format!("  {:24}{:>10}{:>9}{:>9}{:>11}{:>13}", "", "seconds", "share", "calls", "GFLOP", "of the rate"));
    let line = |name: String, cost: &Cost| {
        let share =
            |part: f64, whole: f64| if whole > 0.0 { format!("{:.1} %", 100.0 * part / whole) } else { "-".to_owned() };
        let (gflop, reached) = if cost.flops > 0.0 {
            (format!("{:.2}", cost.flops / 1e9), share(cost.flops, rate * cost.seconds))
        } else {
            ("-".to_owned(), "-".to_owned())
        };
        format!(
            "  {name:24}{:>10.3}{:>9}{:>9}{gflop:>11}{reached:>13}",
            cost.seconds,
            share(cost.seconds, total),
            cost.calls
        )
    };
    for (stage, cost) in profile.by_stage() {
        lines.push(line(stage.to_string(), &cost));
        let ops: Vec<_> = profile.costs.iter().filter(|((of, _), _)| *of == stage).collect();
        if ops.len() > 1 {
            lines.extend(ops.into_iter().map(|((_, op), cost)| line(format!("  {op}"), cost)));
        }
    }
    lines.push("  by kind of operation".to_owned());
    lines.extend(profile.by_op().into_iter().map(|(op, cost)| line(op.to_string(), &cost)));
    Ok(lines.join("\n"))
}
