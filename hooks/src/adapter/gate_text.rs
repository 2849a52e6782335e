//! A gate as text: how it is written, and how it is read back from a command line, a config or a CSV.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use crate::adapter::gate::{Gate, Reach, Region};
use crate::chat::select::{Numbers, argument, split};
use crate::chat::tokens::unknown;
use crate::error::{Error, Result};
use crate::proj::Proj;

/// Names that each mean several projections.
const MODULES: [(&str, &[Proj]); 3] = [
    ("attention", &[Proj::Q, Proj::K, Proj::V, Proj::O]),
    ("mlp", &[Proj::Gate, Proj::Up, Proj::Down]),
    ("qk", &[Proj::Q, Proj::K]),
];

impl Gate {
    /// The syntax of a gate, for help texts.
    pub const SYNTAX: &'static str = "everywhere, nowhere, only:TOKENS or except:TOKENS, and after it any of *layers(0..12), \
                                      *modules(q,k,v) and *0.5; TOKENS: a class, \"text\", ids(..), positions(..), joined by +";

    #[expect(clippy::float_cmp, reason = "a dose that is written is compared as it is written")]
    fn has_dose(&self) -> bool {
        self.dose != 1.0
    }
}

impl fmt::Display for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kind, mut factors) = match &self.reach {
            Reach::Everywhere => ("", vec!["everywhere".to_owned()]),
            Reach::Nowhere => ("", vec!["nowhere".to_owned()]),
            Reach::Only(region) => ("only:", region.factors()),
            Reach::Except(region) => ("except:", region.factors()),
        };
        factors.extend(self.has_dose().then(|| self.dose.to_string()));
        f.pad(&format!("{kind}{}", factors.join("*")))
    }
}

impl Region {
    fn factors(&self) -> Vec<String> {
        let modules = self.modules.as_ref().map(|modules| {
            let names: Vec<_> = modules.iter().map(|proj| short(*proj)).collect();
            format!("modules({})", names.join(","))
        });
        let layers = self.layers.as_ref().map(|layers| format!("layers({layers})"));
        let tokens = self.tokens.as_ref().map(ToString::to_string);
        tokens.into_iter().chain(layers).chain(modules).collect()
    }
}

impl FromStr for Gate {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let text = text.trim();
        let factors = split(text, &['*', '×'])?;
        let (kind, first) = match factors[0].split_once(':') {
            Some((kind @ ("only" | "except"), first)) => (kind, first.trim()),
            _ => (factors[0].trim(), ""),
        };
        let twice = |what: &str| Error::invalid(format!("gate {text}"), format!("{what} once"), "twice");
        let once = |is_new: bool, what: &str| if is_new { Ok(()) } else { Err(twice(what)) };
        let (mut region, mut dose) = (Region::default(), None);
        for (at, factor) in std::iter::once(first).chain(factors[1..].iter().map(|factor| factor.trim())).enumerate() {
            if let Some(inside) = argument(factor, "layers") {
                once(region.layers.replace(Numbers::parse(inside, "the layers of a gate")?).is_none(), "layers")?;
            } else if let Some(inside) = argument(factor, "modules") {
                once(region.modules.replace(modules(inside)?).is_none(), "modules")?;
            } else if let Ok(number) = factor.parse::<f64>() {
                once(dose.replace(number).is_none(), "a dose")?;
            } else if at == 0 && !first.is_empty() {
                region.tokens = Some(factor.parse()?);
            } else if at > 0 {
                return Err(unknown("factor of a gate", factor, &["layers(0..12)", "modules(q,k,v)", "0.5"]));
            }
        }
        let dose = dose.unwrap_or(1.0);
        if !(dose as f32).is_finite() {
            return Err(Error::invalid(format!("the dose of gate {text}"), "a number that f32 can hold", dose));
        }
        let reach = match kind {
            "everywhere" if region == Region::default() => Reach::Everywhere,
            "nowhere" if factors.len() == 1 => Reach::Nowhere,
            "only" if region != Region::default() => Reach::Only(region),
            "except" if region != Region::default() => Reach::Except(region),
            _ => {
                let known = ["everywhere", "everywhere*0.5", "nowhere", "only:CLASS[+CLASS]", "except:CLASS[+CLASS]"];
                let more = [
                    "only:\"text\"",
                    "only:positions(0..6,-1)",
                    "only:ids(151644)",
                    "only:CLASS*layers(0..12)*modules(q,k,v)*0.5",
                ];
                return Err(unknown("gate", text, &[&known[..], &more[..]].concat()));
            }
        };
        Ok(Self { reach, dose })
    }
}

/// Parses projections, given by their short names, their names in transformers, or a name for several.
fn modules(text: &str) -> Result<BTreeSet<Proj>> {
    let mut found: BTreeSet<Proj> = BTreeSet::new();
    for name in text.split(',').map(str::trim) {
        let several = MODULES.iter().find(|(known, _)| *known == name);
        let one = Proj::ALL.into_iter().find(|proj| proj.name() == name || short(*proj) == name);
        match (several, one) {
            (Some((_, several)), _) => found.extend(*several),
            (_, Some(one)) => found.extend([one]),
            _ => {
                let short = Proj::ALL.into_iter().map(short).chain(MODULES.map(|(name, _)| name));
                return Err(unknown("module of a gate", name, &short.collect::<Vec<_>>()));
            }
        }
    }
    Ok(found)
}

/// A projection's short name, such as `q` for `q_proj`.
fn short(proj: Proj) -> &'static str {
    proj.name().trim_end_matches("_proj")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gate(text: &str) -> Gate {
        text.parse().unwrap()
    }

    #[test]
    fn the_text_is_read_back() {
        for text in [
            "everywhere",
            "nowhere",
            "everywhere*0.5",
            "only:template",
            "except:entity+user.content",
            "only:gen",
            "only:\"Qwen\"",
            "except:\"a\\\"b\\\\+*\\n\"#2+entity",
            "only:ids(5,151644)+positions(0..6,-1)",
            "only:not(entity)*layers(0..12)*modules(q,k,v)*0.5",
            "except:layers(3)",
            "only:modules(gate,up,down)*-1.5",
        ] {
            assert_eq!(gate(text).to_string(), text);
            assert_eq!(gate(&gate(text).to_string()), gate(text));
            let json = serde_json::to_string(&text).unwrap();
            assert_eq!(serde_json::to_string(&gate(text)).unwrap(), json);
            assert_eq!(serde_json::from_str::<Gate>(&json).unwrap(), gate(text));
        }
        for (text, back) in [
            ("only:user+user", "only:user"),
            (" only: user + gen × 0.5 × layers(0,1) ", "only:user+gen*layers(0..2)*0.5"),
            ("only:modules(mlp,q_proj)", "only:modules(q,gate,up,down)"),
            ("only:modules(qk)", "only:modules(q,k)"),
        ] {
            assert_eq!(gate(text).to_string(), back);
        }
        assert!(Gate::default().is_everywhere() && gate("nowhere").is_nowhere());
    }

    #[test]
    fn a_misspelt_gate_is_told_the_nearest() {
        let message = |text: &str| text.parse::<Gate>().unwrap_err().to_string();
        assert!(message("everywere").ends_with("the nearest is everywhere"), "{}", message("everywere"));
        assert!(message("only:qwen").ends_with("asst.think, gen"), "{}", message("only:qwen"));
        assert!(message("only:templat").ends_with("the nearest is template"), "{}", message("only:templat"));
        assert!(message("only:modules(qq,v)").contains("module of a gate \"qq\""), "{}", message("only:modules(qq,v)"));
        assert!(message("only:entity*layer(0)").contains("layers(0..12)"), "{}", message("only:entity*layer(0)"));
        for text in [
            "",
            "only",
            "only:",
            "only:user+",
            "except: ",
            "Everywhere",
            "all",
            "only:\"",
            "only:\"\"",
            "only:\"a\"#0",
            "only:\"a\"b",
            "only:user*2*3",
            "only:layers()",
            "only:layers(0)*layers(1)",
            "nowhere*2",
            "everywhere*layers(0)",
            "only:user*inf",
            "only:user*1e39",
            "only:\"a\\x\"",
            "only:ids(a)",
            "only:user*NaN",
            "only:0.5*user",
            "only:not(user",
        ] {
            assert!(text.parse::<Gate>().is_err(), "{text:?}");
        }
    }
}
