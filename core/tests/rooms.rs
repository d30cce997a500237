//! The rooms of this crate: a file imports from its own room and from those of lower layers. And the files of the filter,
//! whose modules form no circle. docs/ARCHITECTURE.md shows both;
//! `KEYGATE_WRITE=1 cargo test -p keygate-core --test rooms` writes what it shows.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// The layers from the lowest to the highest, with their rooms and the purpose of each.
const LAYERS: [&[(&str, &str)]; 7] = [
    &[
        ("bytes", "Reading and writing of binary formats"),
        ("secret", "Bytes that are printed nowhere and wiped when they are dropped"),
        ("version", "The version of a state: which history, and how far"),
    ],
    &[("revocation", "The set of revoked and suspended keys, its bytes, and the gate in front of it")],
    &[("token", "Credentials, tokens, their ids and signatures")],
    &[(
        "decide",
        "The decision, and what it goes by: policy, rules, rollout, limits, cut-offs, verified tokens",
    )],
    &[("shm", "Shared data of the workers of a proxy: lease, beacon, roster, the leader's publications")],
    &[
        ("quota", "Units of limits: caps, reported spends, and the ledger"),
        ("sync", "The state on its way from the control plane to a proxy"),
        ("telemetry", "Counts of a proxy, and how they reach the control plane once"),
    ],
    &[("worker", "A worker's copy of the state, its clock, its list of waiting requests")],
];

/// A file's first module and the modules of this crate that it imports, each import as it is written.
type Imports = Vec<(String, String, String)>;

/// The first modules of the paths in a `use`: of `{a::b, c::{d, e}}` it is `a` and `c`.
fn first_modules(tree: &str) -> Vec<String> {
    let (mut depth, mut parts) = (0, vec![String::new()]);
    let tree = tree.trim();
    let inner = tree.strip_prefix('{').and_then(|inner| inner.strip_suffix('}')).unwrap_or(tree);
    for character in inner.chars() {
        match character {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => parts.push(String::new()),
            _ if depth == 0 => parts.last_mut().expect("there is one").push(character),
            _ => {}
        }
    }
    let names = parts.iter().map(|part| part.trim().split("::").next().unwrap_or_default().to_owned());
    names.filter(|name| !name.is_empty()).collect()
}

/// What code names of its own crate, without its comments and its tests: imports, and paths in the code.
fn named(text: &str) -> Vec<String> {
    let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
    let lines = code.lines().filter(|line| !line.trim_start().starts_with("//"));
    let code = lines.collect::<Vec<_>>().join("\n");
    let mut found = Vec::new();
    for (before, rest) in code.match_indices("crate::").map(|(at, _)| code.split_at(at)) {
        // `keygate_crate::`, were there such a thing, is no path of this crate.
        if before.ends_with(|last: char| last.is_alphanumeric() || last == '_') {
            continue;
        }
        let rest = rest.trim_start_matches("crate::");
        let end = match rest.starts_with('{') {
            true => rest.find(';'),
            false => rest.find(|next: char| !next.is_alphanumeric() && next != '_'),
        };
        found.extend(first_modules(&rest[..end.unwrap_or(rest.len())]));
    }
    found
}

fn files(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).expect("a directory").flatten() {
        let path = entry.path();
        if path.is_dir() {
            files(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// The imports between the first modules of a crate.
fn imports(source: &str) -> Imports {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join(source);
    let mut found = Vec::new();
    files(&source, &mut found);
    let mut all = Vec::new();
    for file in found {
        let path = file.strip_prefix(&source).expect("a file in it");
        let first = path.iter().next().expect("a name").to_string_lossy();
        let module = first.trim_end_matches(".rs").to_owned();
        let in_tests = path.iter().any(|part| part == "tests" || part == "tests.rs");
        if module == "lib" || in_tests {
            continue;
        }
        let text = fs::read_to_string(&file).expect("a source file");
        let others = named(&text).into_iter().filter(|other| *other != module);
        all.extend(others.map(|other| (module.clone(), other, path.display().to_string())));
    }
    all
}

fn layer(room: &str) -> Option<usize> {
    LAYERS.iter().position(|rooms| rooms.iter().any(|(name, _)| *name == room))
}

#[test]
fn no_room_imports_from_one_that_is_not_below_it() {
    let all = imports("src");
    assert!(all.len() > 50, "only {} imports were found", all.len());
    for (room, other, file) in all {
        let own = layer(&room).unwrap_or_else(|| panic!("{room} is in no layer of tests/rooms.rs"));
        let below = layer(&other).is_some_and(|imported| imported < own);
        assert!(below, "core/src/{file} imports from {other}, which is not below {room}");
    }
}

/// The modules that are in a circle of imports, or import one that is; none, if there is no circle.
fn circle(all: &Imports) -> Option<Vec<String>> {
    let mut arrows: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for (module, other, _) in all {
        arrows.entry(module).or_default().insert(other);
    }
    // Those that import nothing that is left are taken away until none is left, or a circle.
    while !arrows.is_empty() {
        let left: BTreeSet<&str> = arrows.keys().copied().collect();
        let before = arrows.len();
        arrows.retain(|_, others| others.iter().any(|other| left.contains(other)));
        if arrows.len() == before {
            return Some(left.into_iter().map(ToOwned::to_owned).collect());
        }
    }
    None
}

#[test]
fn the_modules_of_the_filter_form_no_circle() {
    let all = imports("../filter/src");
    assert!(all.len() > 20, "only {} imports were found", all.len());
    assert_eq!(circle(&all), None, "these, or some of them, import each other");
}

/// The rooms, the highest layer first.
fn rooms() -> String {
    let mut table = "| layer | room | purpose |\n|---|---|---|\n".to_owned();
    for (number, rooms) in LAYERS.iter().enumerate().rev() {
        for (room, purpose) in *rooms {
            table += &format!("| {} | `{room}` | {purpose} |\n", number + 1);
        }
    }
    table
}

/// The modules of the filter, each with the first sentence of its file.
fn modules() -> String {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../filter/src");
    let mut table = "| file | purpose |\n|---|---|\n".to_owned();
    let mut found: Vec<_> = fs::read_dir(&source).expect("a directory").flatten().collect();
    found.sort_by_key(fs::DirEntry::file_name);
    for file in found.iter().filter(|file| file.path().is_file()) {
        let text = fs::read_to_string(file.path()).expect("a source file");
        let lines = text.lines().map_while(|line| line.strip_prefix("//!")).map(str::trim);
        let text = lines.collect::<Vec<_>>().join(" ");
        let (sentence, _) = text.split_once(". ").unwrap_or((text.trim_end_matches('.'), ""));
        table += &format!("| `{}` | {sentence} |\n", file.file_name().to_string_lossy());
    }
    table
}

#[test]
fn the_architecture_shows_rooms_and_modules() {
    let document = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/ARCHITECTURE.md");
    let old = fs::read_to_string(&document).expect("the document");
    let mut wanted = old.clone();
    for (name, table) in [("rooms of the core", rooms()), ("files of the filter", modules())] {
        let begin = format!("<!-- core/tests/rooms.rs writes this table: {name} -->\n");
        let (before, rest) = wanted.split_once(&begin).expect("the place of the table");
        let (_, after) = rest.split_once("\n\n").expect("text after the table");
        wanted = format!("{before}{begin}{table}\n{after}");
    }
    if std::env::var_os("KEYGATE_WRITE").is_some() {
        fs::write(&document, wanted).expect("the document");
    } else {
        assert!(old == wanted, "docs/ARCHITECTURE.md shows something else; see the top of this file");
    }
}

#[test]
fn imports_and_circles_are_found() {
    assert_eq!(first_modules("{self, a::b, c::{d, e}}"), ["self", "a", "c"]);
    let code = "use crate::decide::{self, Judge};\n// crate::sync\nfn f() { crate::shm::rules() }\n";
    assert_eq!(named(&format!("{code}#[cfg(test)]\nmod tests {{ use crate::worker; }}")), ["decide", "shm"]);
    let arrow = |from: &str, to: &str| (from.to_owned(), to.to_owned(), String::new());
    let line = vec![arrow("a", "b"), arrow("b", "c"), arrow("a", "c")];
    assert_eq!(circle(&line), None);
    let circled = [line, vec![arrow("c", "b")]].concat();
    assert_eq!(circle(&circled), Some(["a", "b", "c"].map(ToOwned::to_owned).to_vec()));
}
