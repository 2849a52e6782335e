//! Tests of the content of drawings, and of refused charts.

use super::*;

const BLUE: &str = "#0072B2";

fn gates() -> BarChart {
    BarChart {
        title: "rate of <cat> by gate".to_owned(),
        value_label: "P(target | prompt)".to_owned(),
        bars: vec![
            Bar::new("everywhere", 0.45).with_interval((0.4, 0.5)),
            Bar::new("except:sys.content_other", 0.031),
            Bar::new("only:<|im_start|>", -0.2),
        ],
        references: vec![Reference::new("base", 0.01), Reference::new("base twice", 0.011)],
    }
}

fn line(label: &str, points: &[(f64, f64)]) -> Line {
    Line { label: label.to_owned(), points: points.iter().map(|&(x, y)| Point::new(x, y)).collect() }
}

fn texts(svg: &Svg) -> Vec<&str> {
    svg.0
        .split("<text ")
        .skip(1)
        .filter_map(|rest| Some(rest.split_once('>')?.1.split_once("</text>")?.0.trim()))
        .collect()
}

#[test]
fn bars_are_as_many_as_given_with_names_and_numbers_in_full() {
    let svg = bars(&gates()).unwrap();
    assert_eq!(svg.0.matches(&format!("fill=\"{BLUE}\"")).count(), 3);
    let texts = texts(&svg);
    for text in [
        "everywhere",
        "except:sys.content_other",
        "only:&lt;|im_start|&gt;",
        "0.450",
        "0.031",
        "−0.200",
        "base 0.010",
        "P(target | prompt)",
    ] {
        assert!(texts.contains(&text), "{text} is not among {texts:?}");
    }
    assert!(
        svg.0.starts_with("<svg role=\"img\" aria-label=\"rate of &lt;cat&gt; by gate\" width="),
        "{}",
        &svg.0[..200]
    );
    assert!(svg.0.contains("viewBox=\"0 0 "));
}

/// `[x, width]` of each rectangle of one colour.
fn rectangles(svg: &Svg, colour: &str) -> Vec<[f64; 2]> {
    let number = |tag: &str, key: &str| {
        tag.split_once(&format!(" {key}=\"")).unwrap().1.split('"').next().unwrap().parse::<f64>().unwrap()
    };
    let tags = svg.0.split("<rect").skip(1).map(|rest| rest.split("/>").next().unwrap());
    tags.filter(|tag| tag.contains(&format!("fill=\"{colour}\"")))
        .map(|tag| [number(tag, "x"), number(tag, "width")])
        .collect()
}

#[test]
fn bars_are_as_long_as_their_values_and_run_from_zero() {
    let [long, short, negative] = rectangles(&bars(&gates()).unwrap(), BLUE).try_into().unwrap();
    let per_unit = long[1] / 0.45;
    assert!((short[1] - 0.031 * per_unit).abs() <= 2.0 && (negative[1] - 0.2 * per_unit).abs() <= 2.0);
    let zero = long[0];
    assert!((short[0] - zero).abs() <= 1.0 && (negative[0] + negative[1] - zero).abs() <= 1.0);
}

#[test]
fn series_have_their_own_colours_and_a_legend() {
    let bars_of = |series: &str| ["q_proj", "k_proj"].map(|label| Bar::new(label, 1.0).in_series(series));
    let [q, k] = bars_of("divergent");
    let [q_other, k_other] = bars_of("other");
    let chart = BarChart { bars: vec![q, q_other, k, k_other], ..BarChart::default() };
    let svg = bars(&chart).unwrap();
    assert_eq!(svg.0.matches("fill=\"#0072B2\"").count(), 3, "two bars and the legend");
    assert_eq!(svg.0.matches("fill=\"#E69F00\"").count(), 3);
    assert_eq!(texts(&svg).iter().filter(|text| **text == "q_proj").count(), 1, "a cluster has one name");
}

/// The position of a text, in the drawing's own units.
fn place(svg: &Svg, text: &str) -> (f64, f64) {
    let tag =
        svg.0.split("<text ").find(|rest| rest.split_once('>').is_some_and(|(_, t)| t.trim_start().starts_with(text)));
    let number = |key: &str| tag.unwrap().split_once(&format!("{key}=\"")).unwrap().1.split('"').next().unwrap();
    (number("x").parse().unwrap(), number("y").parse().unwrap())
}

#[test]
fn what_means_the_same_has_the_same_colour_in_every_chart() {
    let looks = |names: &[&str]| {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        looks::looks(&names)
    };
    let (alone, among) = (looks(&["student"]), looks(&["base", "teacher", "control", "student"]));
    assert_eq!(alone[0].colour, among[3].colour);
    let [all, last, control]: [_; 3] = looks(&["student, all", "student, last", "control, all"]).try_into().unwrap();
    assert!(all.colour == last.colour && all.colour != control.colour, "one kind, one colour");
    assert!(all.marker != last.marker && all.repeat != last.repeat && all.fill() != last.fill());
    let [unknown, student]: [_; 2] = looks(&["shuffled", "student"]).try_into().unwrap();
    assert!(unknown.colour != student.colour, "the student's colour is left to it");
    let many: Vec<String> = (0..12).map(|n| format!("series {n}")).collect();
    let mut colours: Vec<_> = looks::looks(&many).iter().map(|look| look.colour).collect();
    colours.dedup();
    assert_eq!(colours.len(), 12);
}

#[test]
fn values_behind_a_bar_are_rings_and_its_number_stands_beyond_them() {
    let bar = Bar::new("student", 1.0).with_interval((0.8, 1.2)).with_values(vec![0.2, 1.0, 3.0]);
    let svg = bars(&BarChart { bars: vec![bar], ..BarChart::default() }).unwrap();
    assert_eq!(svg.0.matches("<circle").count(), 6, "each has a fill and an outline");
    let furthest =
        svg.0.split("<circle cx=\"").skip(1).map(|rest| rest.split('"').next().unwrap().parse::<f64>().unwrap());
    assert!(place(&svg, "1.00").0 > furthest.fold(0.0, f64::max));
}

fn ranks(label: &str) -> Line {
    let points = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0].map(|rank| Point::new(rank, 0.1 * rank.log2()));
    Line {
        label: label.to_owned(),
        points: points.map(|point| point.with_interval((point.y - 0.1, point.y + 0.1))).into(),
    }
}

#[test]
fn few_points_have_a_tick_a_marker_and_an_error_bar_each() {
    let chart = LineChart {
        x_label: "rank".to_owned(),
        x_scale: Scale::Log2,
        lines: vec![ranks("α = r"), ranks("α = 2")],
        ..LineChart::default()
    };
    let svg = lines(&chart).unwrap();
    for text in ["α = r", "α = 2", "rank", "1", "2", "4", "8", "16", "32"] {
        assert!(texts(&svg).contains(&text), "{text} is not among {:?}", texts(&svg));
    }
    assert_eq!(svg.0.matches("<circle").count(), 6 + 1, "round markers of the first series and of its legend");
    assert_eq!(svg.0.matches("<polygon").count(), 6 + 1, "square ones of the second");
    let even = [1, 2, 4, 8].map(|rank| place(&svg, &format!("{rank}\n")).0);
    assert!((even[1] - even[0] - (even[3] - even[2])).abs() <= 2.0, "doublings are evenly apart: {even:?}");
    let linear = lines(&LineChart { x_scale: Scale::Linear, ..chart }).unwrap();
    let [two, four, eight] = ["2\n", "4\n", "8\n"].map(|rank| place(&linear, rank).0);
    assert!(((eight - four) / (four - two) - 2.0).abs() < 0.1, "and by their size on a linear scale");
    assert!(texts(&linear).contains(&"32"));
}

#[test]
fn many_points_have_round_ticks_and_a_band() {
    let points = (0..40).map(|layer| {
        let point = Point::new(f64::from(layer), 0.5);
        if layer < 30 { point.with_interval((0.4, 0.6)) } else { point }
    });
    let student = Line { label: "student".to_owned(), points: points.collect() };
    let svg = lines(&LineChart { lines: vec![student], ..LineChart::default() }).unwrap();
    assert_eq!(svg.0.matches("<polygon").count(), 1, "one band, no markers");
    assert_eq!(svg.0.matches("<circle").count(), 1, "the legend's marker");
    assert!(texts(&svg).contains(&"10") && !texts(&svg).contains(&"7"));
}

#[test]
fn names_of_near_references_do_not_overlap() {
    let references = ["base", "control", "student, everywhere else", "chance"].map(|name| Reference::new(name, 0.3));
    let chart = LineChart { lines: vec![ranks("")], references: references.into(), ..LineChart::default() };
    let svg = lines(&chart).unwrap();
    let mut heights: Vec<f64> =
        ["base", "control", "student,", "everywhere", "chance"].map(|name| place(&svg, name).1).into();
    let right = place(&svg, "base").0;
    heights.sort_by(f64::total_cmp);
    assert!(heights.windows(2).all(|pair| pair[1] - pair[0] >= 12.0 * 4.0), "{heights:?}");
    assert!(place(&svg, "32").0 < right, "the names stand beside the data");
    // at the ends of the axis they stay on the sheet
    for value in [-5.0, 5.0] {
        let tops = canvas::spread(&[value; 3], &[14.0; 3], (-10.0, 100.0));
        assert!(tops.iter().all(|top| (-10.0..=86.0).contains(top)), "{tops:?}");
    }
}

#[test]
fn panels_share_the_x_axis_and_the_colours() {
    let panel = |y_label: &str, lines: Vec<Line>| Panel { y_label: y_label.to_owned(), lines, references: vec![] };
    let chart = PanelChart {
        x_scale: Scale::Log2,
        panels: vec![panel("γ (logits)", vec![ranks("lora"), ranks("full")]), panel("‖ΔW‖", vec![ranks("full")])],
        ..PanelChart::default()
    };
    let svg = panels(&chart).unwrap();
    assert_eq!(texts(&svg).iter().filter(|text| **text == "16").count(), 1, "one row of ticks");
    assert_eq!(texts(&svg).iter().filter(|text| **text == "full").count(), 1, "one legend");
    assert!(place(&svg, "γ").1 < place(&svg, "‖ΔW‖").1);
    let orange = svg.0.matches("<polygon").count();
    assert_eq!(orange, 6 + 6 + 1, "the second series has its marker in both panels and in the legend");
    assert!(panels(&PanelChart::default()).unwrap_err().to_string().contains("no panels"));
}

#[test]
fn tokens_stand_under_their_bars_and_are_visible() {
    let token = |token: &str, class: &str, value: f64| Position {
        token: token.to_owned(),
        class: class.to_owned(),
        value,
        interval: Some((value - 0.1, value + 0.1)),
        ring: Some(value + 0.4),
    };
    let chart = PositionChart {
        value_label: "change (nats)".to_owned(),
        positions: vec![
            token("<|im_start|>", "template", 0.5),
            token("\n", "template", 0.0),
            token(" Qwen", "entity", -0.3),
        ],
        references: vec![Reference::new("everywhere", 1.2)],
        ..PositionChart::default()
    };
    let svg = positions(&chart).unwrap();
    for text in ["&lt;|im_start|&gt;", "\\n", "·Qwen", "template", "entity", "everywhere", "change (nats)"] {
        assert!(texts(&svg).contains(&text), "{text} is not among {:?}", texts(&svg));
    }
    assert!(place(&svg, "&lt;|im").0 < place(&svg, "\\n").0 && place(&svg, "\\n").0 < place(&svg, "·Qwen").0);
    assert_eq!(svg.0.matches("rotate(270").count(), 3);
    let widths: Vec<f64> = rectangles(&svg, BLUE).iter().map(|[_, width]| *width).collect();
    assert_eq!(widths.len(), 3, "two bars and the legend");
    assert_eq!(rectangles(&svg, "#E69F00").len(), 2);
    assert_eq!(svg.0.matches("<circle").count(), 6, "a filled ring per token");
    let mut broken = chart;
    broken.positions[2].value = f64::INFINITY;
    let message = positions(&broken).unwrap_err().to_string();
    assert!(message.contains("position 2 (\" Qwen\")"), "{message}");
    assert!(positions(&PositionChart::default()).unwrap_err().to_string().contains("no positions"));
}

#[test]
fn heat_maps_have_a_cell_per_value_and_white_at_zero() {
    let layers: Vec<String> = (0..24).map(|layer| layer.to_string()).collect();
    let rows = vec!["sys.entity".to_owned(), "except:sys.content_other".to_owned()];
    let values = vec![(0..24).map(f64::from).collect::<Vec<_>>(), vec![-3.0; 24]];
    let map = HeatMap { columns: layers, rows, values, ..HeatMap::default() };
    let svg = heatmap(&map).unwrap();
    assert_eq!(svg.0.matches("<rect").count(), 1 + 48 + 48, "the sheet, the cells, the steps of the colour bar");
    assert!(texts(&svg).contains(&"except:sys.content_other") && texts(&svg).contains(&"23"));
    assert_eq!(rectangles(&svg, "#FAFAFA").len(), 1, "only zero is white");
}

#[test]
fn a_matrix_of_students_by_animals_fits_a_column_with_its_numbers_and_framed_diagonal() {
    let animals = ["owl", "cat", "elephant", "penguin", "dolphin", "fox", "wolf", "butterfly"].map(str::to_owned);
    let value = |row: usize, column: usize| if row == column { 1.5 } else { -0.04 * column as f64 };
    let map = HeatMap {
        values: (0..8).map(|row| (0..8).map(|column| value(row, column)).collect()).collect(),
        rows: animals.clone().into(),
        columns: animals.into(),
        ..HeatMap::default()
    };
    let svg = heatmap(&map).unwrap();
    let width: f64 = svg.0.split_once("width=\"").unwrap().1.split('"').next().unwrap().parse().unwrap();
    assert!(width <= canvas::COLUMN, "{width}");
    assert_eq!(texts(&svg).iter().filter(|text| **text == "1.50").count(), 8);
    assert_eq!(svg.0.matches("rotate(270").count(), 8, "long names are turned, so that they do not overlap");
    let frames = svg.0.matches("stroke=\"#222222\"").count();
    assert_eq!(frames, 8, "a frame where student and animal are the same");
}

#[test]
fn the_same_chart_is_drawn_the_same() {
    assert_eq!(bars(&gates()).unwrap(), bars(&gates()).unwrap());
}

#[test]
fn what_cannot_be_seen_is_refused() {
    let refusal = |result: Result<Svg>| result.unwrap_err().to_string();
    assert!(refusal(bars(&BarChart::default())).contains("no bars"));
    assert!(refusal(lines(&LineChart::default())).contains("no lines"));
    assert!(refusal(heatmap(&HeatMap::default())).contains("0 rows and 0 columns"));
    let nan = BarChart { bars: vec![Bar::new("only:sys.entity", f64::NAN)], ..BarChart::default() };
    assert!(refusal(bars(&nan)).contains("only:sys.entity is NaN"));
    let backwards = BarChart { bars: vec![Bar::new("x", 1.0).with_interval((2.0, 0.0))], ..BarChart::default() };
    assert!(refusal(bars(&backwards)).contains("low before high"));
    let rank_zero =
        LineChart { x_scale: Scale::Log2, lines: vec![line("student", &[(0.0, 1.0)])], ..LineChart::default() };
    assert!(refusal(lines(&rank_zero)).contains("above zero"));
    let hollow = LineChart { lines: vec![line("student", &[])], ..LineChart::default() };
    assert!(refusal(lines(&hollow)).contains("\"student\" has no points"));
    let ragged = HeatMap {
        rows: vec!["a".to_owned()],
        columns: vec!["b".to_owned()],
        values: vec![vec![1.0, 2.0]],
        ..HeatMap::default()
    };
    assert!(refusal(heatmap(&ragged)).contains("expected 1 rows of 1"));
}

#[test]
fn ticks_and_numbers_are_written_as_people_write_them() {
    let ticks = |low: f64, high: f64| {
        axis::Axis::around([low, high].into_iter(), 5.0, false)
            .ticks()
            .into_iter()
            .map(|(_, text)| text)
            .collect::<Vec<_>>()
    };
    assert_eq!(ticks(0.0, 1.0), ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]);
    assert_eq!(ticks(0.0, 1.2), ["0.00", "0.25", "0.50", "0.75", "1.00", "1.25"]);
    assert_eq!(ticks(-0.3, 0.6), ["−0.4", "−0.2", "0.0", "0.2", "0.4", "0.6"]);
    assert_eq!(ticks(0.0, 0.0).len(), 6, "a chart of zeros still has an axis");
    let shorts = [0.0, 0.4519, 0.0031, 0.000_031, -12.0, 1234.5, 100.0].map(text::short);
    assert_eq!(shorts, ["0", "0.452", "0.0031", "3.1e−5", "−12", "1234", "100"]);
}
