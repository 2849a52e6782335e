//! Colours, markers and dashes of series. The palette is Okabe and Ito's (2008), whose colours colour-blind readers can
//! distinguish.

use plotters::style::{RGBColor, WHITE};

const BLUE: RGBColor = RGBColor(0x00, 0x72, 0xb2);
const ORANGE: RGBColor = RGBColor(0xe6, 0x9f, 0x00);
const GREEN: RGBColor = RGBColor(0x00, 0x9e, 0x73);
const SKY: RGBColor = RGBColor(0x56, 0xb4, 0xe9);
const GREY: RGBColor = RGBColor(0x76, 0x76, 0x76);
const PALETTE: [RGBColor; 7] = [BLUE, ORANGE, GREEN, RGBColor(0xd5, 0x5e, 0x00), RGBColor(0xcc, 0x79, 0xa7), SKY, GREY];
/// Series that have the same colour in all figures.
const KNOWN: [(&str, RGBColor); 10] = [
    ("student", BLUE),
    ("learned", BLUE),
    ("only", BLUE),
    ("except", SKY),
    ("control", ORANGE),
    ("control student", ORANGE),
    ("teacher", GREEN),
    ("base", GREY),
    ("start", GREY),
    ("random", GREY),
];
/// Colours from light to dark, in the order of the series, if there are more series than the palette has colours.
const RAMP: [RGBColor; 4] =
    [RGBColor(0xe6, 0x9f, 0x00), RGBColor(0xc4, 0x4e, 0x52), RGBColor(0x8a, 0x4f, 0xa0), RGBColor(0x3d, 0x55, 0xb5)];

/// A series' colour, and its marker and dash for readers who see no colours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Look {
    pub(super) colour: RGBColor,
    pub(super) marker: usize,
    /// Number of earlier series of the same kind. If there are any, the line is dashed and the bar is lighter.
    pub(super) repeat: usize,
}

impl Look {
    /// The colour of a filled area: lighter for a second series of the same kind.
    pub(super) fn fill(self) -> RGBColor {
        blend(&[self.colour, WHITE], [0.0, 0.45, 0.65][self.repeat.min(2)])
    }
}

/// The looks of series by their names. The text before a comma is the kind: series of one kind share its colour.
pub(super) fn looks(names: &[String]) -> Vec<Look> {
    let kind = |name: &str| name.split(',').next().unwrap_or_default().to_owned();
    let mut kinds: Vec<(String, RGBColor)> = Vec::new();
    let all: Vec<String> = names.iter().map(|name| kind(name)).collect();
    let mut unlike = all.clone();
    unlike.sort();
    unlike.dedup();
    for name in &all {
        if kinds.iter().any(|(other, _)| other == name) {
            continue;
        }
        let free = |colour: &RGBColor| kinds.iter().all(|(_, taken)| taken != colour);
        let known = KNOWN.iter().find(|(known, _)| known == name).map(|(_, colour)| *colour).filter(free);
        // the fixed colour of a later series is not given to another
        let left = |colour: &RGBColor| {
            free(colour) && KNOWN.iter().all(|(known, of)| of != colour || !all.iter().any(|name| name == known))
        };
        let colour = if unlike.len() > PALETTE.len() {
            blend(&RAMP, kinds.len() as f64 / (unlike.len() - 1) as f64)
        } else {
            known.or_else(|| PALETTE.into_iter().find(left)).or_else(|| PALETTE.into_iter().find(free)).unwrap_or(GREY)
        };
        kinds.push((name.clone(), colour));
    }
    let look = |(index, name): (usize, &String)| Look {
        colour: kinds.iter().find(|(kind, _)| kind == name).map_or(GREY, |(_, colour)| *colour),
        marker: index,
        repeat: all[..index].iter().filter(|other| *other == name).count(),
    };
    all.iter().enumerate().map(look).collect()
}

/// The colour at `part` (0 to 1) of a scale with evenly spaced `stops`.
pub(super) fn blend(stops: &[RGBColor], part: f64) -> RGBColor {
    let place = part.clamp(0.0, 1.0) * (stops.len() - 1) as f64;
    let below = (place.floor() as usize).min(stops.len() - 2);
    let (from, to, share) = (stops[below], stops[below + 1], place - below as f64);
    let mix = |a: u8, b: u8| (f64::from(a) + (f64::from(b) - f64::from(a)) * share).round() as u8;
    RGBColor(mix(from.0, to.0), mix(from.1, to.1), mix(from.2, to.2))
}
