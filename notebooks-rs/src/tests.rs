//! This file is its own notebook: `main` below is what the page shows.
#![allow(clippy::unwrap_used)]

use super::*;

fn main(nb: &mut Notebook) {
    //| # Two and two
    //|
    //| We add them.
    let sum = 2 + 2;
    nb.show(sum); // four

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
"#;

fn notebook() -> Notebook {
    let mut nb = Notebook::open(include_str!("tests.rs"), "pages/tiny.md");
    main(&mut nb);
    nb
}

#[test]
fn the_page_is_prose_code_and_results_in_order() {
    assert_eq!(notebook().markdown().unwrap(), PAGE);
}

#[test]
fn the_page_and_its_figures_are_written_the_same_again() {
    let folder = std::env::temp_dir().join(format!("undertone-notebook-{}", std::process::id()));
    let page = folder.join("tiny.md");
    let run = || {
        let mut nb = Notebook::open(include_str!("tests.rs"), &page);
        main(&mut nb);
        nb.write().unwrap();
        (files::read(&page).unwrap(), files::read(&folder.join("tiny-bars.svg")).unwrap())
    };
    let first = run();
    assert_eq!(first, (PAGE.as_bytes().to_vec(), b"<svg/>".to_vec()));
    assert_eq!(run(), first);
    std::fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn what_is_shown_outside_of_main_is_refused() {
    let mut nb = notebook();
    nb.show("not on the page");
    assert!(nb.markdown().unwrap_err().to_string().contains("outside of main"));
}

#[test]
fn a_source_without_main_is_refused() {
    assert!(Notebook::open("fn other() {}", "page.md").markdown().is_err());
}
