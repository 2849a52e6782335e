//! This file is its own notebook: `main` below is what the page shows.

use serde_json::{Value, json};

use super::*;

fn main(nb: &mut Notebook) {
    //| # Two and two
    //|
    //| We add them.
    let sum = 2 + 2;
    nb.show(sum); // four

    //| Once more?
    //|
    //| ## More
    //|
    //| And once more, over several lines, with a table.
    for row in 0..2 {
        nb.show(format!("row {row} of ``` fences"));
    }
    nb.table(&[
        vec!["gate", "p"], // the names
        vec!["only:<|im_start|>", "0.1"],
    ]);
    nb.figure("bars", Svg("<svg/>".to_owned()));
}

const PAGE: &str = r#"# Two and two

We add them.

```rust
let sum = 2 + 2;
nb.show(sum); // four
```

```text
4
```

Once more?

## More

And once more, over several lines, with a table.

```rust
for row in 0..2 {
    nb.show(format!("row {row} of ``` fences"));
}
```

````text
row 0 of ``` fences
````

````text
row 1 of ``` fences
````

```rust
nb.table(&[
    vec!["gate", "p"], // the names
    vec!["only:<|im_start|>", "0.1"],
]);
```

| gate | p |
| --- | --- |
| only:&lt;\|im_start\|> | 0.1 |

```rust
nb.figure("bars", Svg("<svg/>".to_owned()));
```

![bars](tiny-bars.svg)

*`cargo run --release -p notebooks-rs --example tiny` runs this notebook and prints it anew; its imports and helpers are in `notebooks-rs/examples/tiny.rs`.*
"#;

fn notebook() -> Notebook {
    let mut nb = Notebook::within("examples/tiny.rs", include_str!("tests.rs"), "pages", "ipynb");
    main(&mut nb);
    nb
}

fn page(nb: &Notebook) -> String {
    markdown::page(nb, &nb.parts().unwrap())
}

fn cells(nb: &Notebook) -> Vec<Value> {
    let whole: Value = serde_json::from_str(&ipynb::notebook(nb, &nb.parts().unwrap()).unwrap()).unwrap();
    assert_eq!((&whole["nbformat"], &whole["nbformat_minor"]), (&json!(4), &json!(5)));
    assert_eq!(whole["metadata"]["kernelspec"]["name"], "rust");
    whole["cells"].as_array().unwrap().clone()
}

/// The text of a list of lines.
fn text(lines: &Value) -> String {
    lines.as_array().unwrap().iter().map(|line| line.as_str().unwrap()).collect()
}

#[test]
fn the_page_is_prose_code_and_results_in_order() {
    assert_eq!(page(&notebook()), PAGE);
}

#[test]
fn the_jupyter_notebook_has_each_result_under_the_cell_that_showed_it() {
    let cells = cells(&notebook());
    let kinds: Vec<_> = cells.iter().map(|cell| cell["cell_type"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["markdown", "markdown", "code", "markdown", "markdown", "code", "code", "code"]);
    assert!(text(&cells[0]["source"]).contains("cargo run --release -p notebooks-rs --example tiny`"));
    assert_eq!(text(&cells[1]["source"]), "# Two and two\n\nWe add them.");
    assert_eq!(text(&cells[2]["source"]), "let sum = 2 + 2;\nnb.show(sum); // four");
    assert_eq!(cells[2]["execution_count"], 1);
    assert_eq!(cells[2]["outputs"].as_array().unwrap().len(), 1);
    assert_eq!(text(&cells[2]["outputs"][0]["data"]["text/plain"]), "4");
    assert_eq!(text(&cells[4]["source"]), "## More\n\nAnd once more, over several lines, with a table.");

    assert_eq!(cells[5]["outputs"].as_array().unwrap().len(), 2, "a loop's results are all under the loop");
    assert_eq!(text(&cells[5]["outputs"][1]["data"]["text/plain"]), "row 1 of ``` fences");
    let table = &cells[6]["outputs"][0]["data"];
    assert_eq!(text(&table["text/plain"]), "gate               p\nonly:<|im_start|>  0.1");
    assert!(text(&table["text/html"]).contains(">only:&lt;|im_start|&gt;</td>"), "{table}");
    assert_eq!(cells[7]["execution_count"], 4);
    assert_eq!(text(&cells[7]["outputs"][0]["data"]["image/svg+xml"]), "<svg/>");
}

#[test]
fn ids_of_cells_are_distinct_and_keep_to_their_text() {
    let ids = |source: &'static str| -> Vec<String> {
        let cells = cells(&Notebook::within("n.rs", source, "", ""));
        cells.iter().map(|cell| cell["id"].as_str().unwrap().to_owned()).collect()
    };
    let before = ids("fn main() {\n    //| We add.\n    add();\n    //| Again.\n    add();\n}\n");
    let after = ids("fn main() {\n    new();\n    //| We add.\n    add();\n    //| And again.\n    add();\n}\n");
    let distinct: std::collections::BTreeSet<&String> = before.iter().collect();
    assert_eq!(distinct.len(), 5, "{before:?}");
    assert!(before.iter().all(|id| id.len() == 16 && id.bytes().all(|byte| byte.is_ascii_hexdigit())));
    let kept: Vec<bool> = before.iter().map(|id| after.contains(id)).collect();
    assert_eq!(kept, [true, true, true, false, true], "only the prose that was changed has another id");
}

#[test]
fn a_heading_begins_a_cell_and_links_lead_to_notebooks() {
    let source = "fn main() {\n    //| # One\n    //| ```sh\n    //| # make\n    //| ```\n    //| ## Two\n    //| #hash\n    //| [one](1.md)\n}\n";
    let cells = cells(&Notebook::within("n.rs", source, "", ""));
    let sources: Vec<String> = cells[1..].iter().map(|cell| text(&cell["source"])).collect();
    assert_eq!(sources, ["# One\n```sh\n# make\n```", "## Two\n#hash\n[one](1.ipynb)"]);
}

#[test]
fn all_files_are_written_the_same_again() {
    let folder = std::env::temp_dir().join(format!("undertone-notebook-{}", std::process::id()));
    let run = || {
        let mut nb = Notebook::within("tiny.rs", include_str!("tests.rs"), folder.join("pages"), folder.join("ipynb"));
        main(&mut nb);
        nb.write().unwrap();
        ["pages/tiny.md", "pages/tiny-bars.svg", "ipynb/tiny.ipynb"]
            .map(|file| files::read(&folder.join(file)).unwrap())
    };
    let first = run();
    assert_eq!(first[..2], [PAGE.as_bytes().to_vec(), b"<svg/>".to_vec()]);
    assert_eq!(run(), first);
    std::fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn long_lines_of_words_are_broken_and_columns_are_not() {
    let sentence = ["word"; 40].join(" ");
    let lines: Vec<usize> = wrapped(&sentence).lines().map(str::len).collect();
    assert_eq!(lines, [109, 89]); // 22 words and 18, with the spaces between them
    assert_eq!(wrapped(&sentence).replace('\n', " "), sentence);
    let columns = ["word"; 40].join("  ");
    assert_eq!(wrapped(&columns), columns);
}

#[test]
fn what_is_shown_outside_of_main_is_refused() {
    let mut nb = notebook();
    nb.show("not on the page");
    assert!(nb.parts().err().unwrap().to_string().contains("outside of main"));
}

#[test]
fn a_source_without_main_is_refused() {
    assert!(Notebook::within("n.rs", "fn other() {}", "", "").parts().is_err());
}
