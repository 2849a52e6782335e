//! What a reader must find in a drawing, and what is refused.
#![allow(clippy::unwrap_used)]

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
        "0.45",
        "0.031",
        "−0.2",
        "base 0.01",
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

#[test]
fn lines_have_a_path_and_a_name_each_and_a_band_where_known() {
    let mut student = line("student", &[(0.0, 0.1), (1.0, 0.4), (2.0, 0.3)]);
    for point in &mut student.points[..2] {
        point.interval = Some((point.y - 0.05, point.y + 0.05));
    }
    let control = line("control", &[(0.0, 0.0), (2.0, 0.05)]);
    let chart = LineChart { x_label: "layer".to_owned(), lines: vec![student, control], ..LineChart::default() };
    let svg = lines(&chart).unwrap();
    assert_eq!(svg.0.matches("<polygon").count(), 1);
    assert_eq!(svg.0.matches("<circle").count(), 5);
    for text in ["student", "control", "layer", "0", "1", "2"] {
        assert!(texts(&svg).contains(&text), "{text} is not among {:?}", texts(&svg));
    }
}

#[test]
fn ranks_have_ticks_at_powers_of_two() {
    let chart = LineChart {
        x_scale: Scale::Log2,
        lines: vec![line("", &[(1.0, 0.1), (4.0, 0.4), (256.0, 0.2)])],
        ..LineChart::default()
    };
    let svg = lines(&chart).unwrap();
    for rank in ["1", "2", "16", "128", "256"] {
        assert!(texts(&svg).contains(&rank), "{rank} is not among {:?}", texts(&svg));
    }
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
        canvas::Axis::around([low, high].into_iter(), 5.0, false)
            .ticks()
            .into_iter()
            .map(|(_, text)| text)
            .collect::<Vec<_>>()
    };
    assert_eq!(ticks(0.0, 1.0), ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]);
    assert_eq!(ticks(0.0, 1.2), ["0.00", "0.25", "0.50", "0.75", "1.00", "1.25"]);
    assert_eq!(ticks(-0.3, 0.6), ["−0.4", "−0.2", "0.0", "0.2", "0.4", "0.6"]);
    assert_eq!(ticks(0.0, 0.0).len(), 6, "a chart of zeros still has an axis");
    let shorts = [0.0, 0.4519, 0.0031, 0.000_031, -12.0, 1234.5, 100.0].map(canvas::short);
    assert_eq!(shorts, ["0", "0.452", "0.0031", "3.1e−5", "−12", "1234", "100"]);
}
