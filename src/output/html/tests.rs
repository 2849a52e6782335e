use super::*;

fn figure(width: u32) -> Figure {
    let svg = Svg(format!("<svg role=\"img\" width=\"{width}\" viewBox=\"0 0 1 1\"></svg>"));
    Figure { svg, path: format!("token-ablation/{width}.svg") }
}

fn report() -> Report {
    let row = |gate: &str, value: &str| vec![gate.to_owned(), value.to_owned()];
    let section = Section {
        id: "token-ablation".to_owned(),
        title: "Where the adapter acts".to_owned(),
        question: "Does <|im_start|> carry it?".to_owned(),
        reading: "\"Qwen\" & template: 0.33 of 0.45.".to_owned(),
        notes: vec!["1 < 2".to_owned()],
        control: "a student of <other> numbers".to_owned(),
        figures: vec![figure(420), figure(860)],
        csv: "token-ablation/rows.csv".to_owned(),
        settings: "gates = [\"only:<x>\"]\n".to_owned(),
        table: Some(Table {
            header: vec!["gate".to_owned(), "p_target".to_owned()],
            rows: (0..25).map(|n| row(&format!("only:<{n}>"), "0.3333333333333333")).collect(),
        }),
    };
    Report {
        title: "cats <script>".to_owned(),
        sections: vec![section],
        provenance: vec![("seed".to_owned(), "1".to_owned())],
        ..Report::default()
    }
}

#[test]
fn every_text_is_escaped_and_figures_are_not() {
    let page = html(&report());
    assert!(page.contains("Does &lt;|im_start|&gt; carry it?") && !page.contains("<|im_start|>"));
    assert!(page.contains("<title>cats &lt;script&gt;</title>") && !page.contains("<script"));
    assert!(page.contains("&quot;Qwen&quot; &amp; template") && page.contains("<li>1 &lt; 2</li>"));
    assert!(page.contains("a student of &lt;other&gt; numbers") && page.contains("[&quot;only:&lt;x&gt;&quot;]"));
    assert!(page.contains(&figure(420).svg.0));
    let title = "the owl's\u{1b}[31m\ttoken".to_owned();
    assert!(html(&Report { title, ..report() }).contains("<h1>the owl&#39;s\\u{1b}[31m\ttoken</h1>"));
}

#[test]
fn contents_lead_to_sections() {
    let page = html(&report());
    for id in ["token-ablation", "provenance"] {
        assert!(page.contains(&format!("href=\"#{id}\"")) && page.contains(&format!("<section id=\"{id}\"")), "{id}");
    }
    assert!(page.contains("href=\"token-ablation/rows.csv\""));
}

#[test]
fn the_answer_comes_first_with_the_cell_of_each_number() {
    let number = |label: &str| Number {
        label: label.to_owned(),
        value: "+1.75".to_owned(),
        csv: "target_rate/rows.csv".to_owned(),
        cell: "delta_logp where model is student".to_owned(),
    };
    let opening =
        Opening { headline: "It did.".to_owned(), figure: Some(figure(400)), numbers: vec![number("student")] };
    let page = html(&Report { opening, ..report() });
    let at = |text: &str| page.find(text).unwrap_or_else(|| panic!("{text} is not on the page"));
    let order = ["<h1>", "It did.", "width=\"400\"", "+1.75", "<nav", "<section id=\"token-ablation\""].map(at);
    assert!(order.is_sorted(), "{order:?}");
    assert!(page.contains("<a href=\"target_rate/rows.csv\">target_rate/rows.csv</a>: delta_logp where model"));
}

#[test]
fn wide_figures_are_told_apart_and_all_are_linked() {
    let page = html(&report());
    assert_eq!(page.matches("<figure class=\"wide\">").count(), 1);
    assert_eq!(page.matches("<figure>").count(), 1);
    assert!(page.contains("href=\"token-ablation/420.svg\"") && page.contains("href=\"token-ablation/860.svg\""));
}

#[test]
fn in_the_dark_paper_ink_and_grid_of_a_real_figure_change() {
    use analyses::plot::{Bar, BarChart, bars};
    let bar = Bar::new("student", 1.0).with_interval((0.5, 1.5)).with_values(vec![0.7]);
    let svg = bars(&BarChart { bars: vec![bar], ..BarChart::default() }).unwrap().0;
    for (attribute, rule) in [
        ("fill=\"#FFFFFF\"", "svg [fill='#FFFFFF']"),
        ("fill=\"#222222\"", "svg text[fill='#222222']"),
        ("fill=\"#595959\"", "svg text[fill='#595959']"),
        ("stroke=\"#222222\"", "svg [stroke='#222222']"),
        ("stroke=\"#888888\"", "svg [stroke='#888888']"),
        ("stroke=\"#E4E4E4\"", "svg [stroke='#E4E4E4']"),
        ("fill=\"#0072B2\"", "svg [fill='#0072B2']"),
    ] {
        assert!(svg.contains(attribute), "no figure has {attribute} any more");
        assert!(STYLE.contains(rule), "{rule}");
    }
}

#[test]
fn the_table_shows_twenty_rows_and_says_of_how_many() {
    let page = html(&report());
    assert_eq!(page.matches("<tr>").count(), 1 + ROWS_SHOWN);
    assert!(
        page.contains("The first 20 of 25 rows")
            && page.contains("only:&lt;19&gt;")
            && !page.contains("only:&lt;20&gt;")
    );
    assert!(page.contains("<td class=\"number\">0.33333</td>"), "long numbers are rounded");
}

#[test]
fn the_banner_is_there_only_when_given() {
    let banner = Some("weights are random".to_owned());
    assert!(!html(&report()).contains("class=\"banner\""));
    assert!(html(&Report { banner, ..report() }).contains("role=\"note\">weights are random</p>"));
}

#[test]
fn nothing_is_loaded_from_elsewhere() {
    let page = html(&report());
    for outside in ["http:", "https:", "src=", "@import", "url("] {
        assert!(!page.contains(outside), "{outside}");
    }
}

#[test]
fn numbers_are_rounded_and_other_cells_are_not() {
    let cells =
        ["0.123456789", "-12.3456789012", "1.23456789e-7", "12345678901", "0.25", "1.0.0.0.0.0", "only:sys.entity"]
            .map(rounded);
    assert_eq!(cells, ["0.12346", "-12.346", "1.235e-7", "12345678901", "0.25", "1.0.0.0.0.0", "only:sys.entity"]);
}
