//! The layers of the control plane: a module imports from its own layer and from those below it, never from above.
//! docs/ARCHITECTURE.md shows them; `KEYGATE_WRITE=1 cargo test -p keygate --test layers` writes what it shows.

use std::fs;
use std::path::{Path, PathBuf};

/// The layers from the lowest to the highest, with their rooms: the modules at the top of the crate.
const LAYERS: [&[&str]; PURPOSES.len()] = [
    &["platform"],
    &["secrets"],
    &["model"],
    &["durability"],
    &["config"],
    &["observe"],
    &["node", "peers"],
    &["services"],
    &["redis_store"],
    &["http"],
    &["app", "cli", "lib", "main"],
];

/// The purpose of each layer.
const PURPOSES: [&str; 11] = [
    "Operating system, network, time and randomness",
    "Key material: nothing else sees plain bytes",
    "The model: a change in, a state out",
    "Durability: makes changes last",
    "Settings from file, environment and flags",
    "Observation: reports of proxies, metrics, notifications",
    "The handles that services and API share",
    "Services: loops, each with its own state",
    "Redis: the copy, the peers, operators' edits",
    "HTTP: parses a request, calls, shapes the answer",
    "Assembly and commands",
];

/// The layer of a module or of something in it, if it is in one.
fn layer(path: &str) -> Option<usize> {
    let room = path.split("::").next()?;
    LAYERS.iter().position(|rooms| rooms.contains(&room))
}

/// The paths of a `use` without its braces: `a::{b, c::{d}}` is `a::b` and `a::c::d`.
fn expand(tree: &str) -> Vec<String> {
    let tree = tree.trim();
    let Some((prefix, rest)) = tree.split_once('{') else { return vec![tree.to_owned()] };
    let inner = rest.rsplit_once('}').map_or(rest, |(inner, _)| inner);
    let (mut depth, mut parts) = (0, vec![String::new()]);
    for character in inner.chars() {
        match character {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(String::new());
                continue;
            }
            _ => {}
        }
        parts.last_mut().expect("there is one").push(character);
    }
    let parts = parts.iter().filter(|part| !part.trim().is_empty());
    parts.flat_map(|part| expand(&format!("{prefix}{}", part.trim()))).collect()
}

/// The imports of a file from this crate, and the paths in its code that name another module of it, without its tests.
fn imports(text: &str) -> Vec<String> {
    let code = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
    let uses = code.split("use crate::").skip(1);
    let imported = uses.filter_map(|rest| rest.split_once(';')).flat_map(|(tree, _)| expand(tree));
    let lines =
        code.lines().filter(|line| !line.trim_start().starts_with("//") && !line.contains("use crate::"));
    let named = lines.flat_map(|line| line.split("crate::").skip(1)).map(|rest| {
        let end = rest.find(|character: char| !character.is_alphanumeric() && !"_:".contains(character));
        rest[..end.unwrap_or(rest.len())].to_owned()
    });
    imported.chain(named).collect()
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

/// All imports, each with the module that it is in.
fn all_imports() -> Vec<(String, String)> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    files(&source, &mut found);
    let mut all = Vec::new();
    for file in found {
        let module = file.strip_prefix(&source).expect("a file in it").with_extension("");
        let module = module.to_string_lossy().replace('/', "::");
        let module = module.strip_suffix("::mod").unwrap_or(&module).to_owned();
        // The world of the API's own tests starts a whole control plane.
        if module.ends_with("tests") || module == "http::api::world" {
            continue;
        }
        let text = fs::read_to_string(&file).expect("a source file");
        all.extend(imports(&text).into_iter().map(|import| (module.clone(), import)));
    }
    all
}

#[test]
fn no_module_imports_from_a_layer_above_it() {
    let all = all_imports();
    assert!(all.len() > 400, "only {} imports were found", all.len());
    let mut upwards = Vec::new();
    for (module, import) in &all {
        let own = layer(module).unwrap_or_else(|| panic!("{module} is in no layer of tests/layers.rs"));
        if layer(import).is_some_and(|imported| imported > own) {
            upwards.push((module.as_str(), import.as_str()));
        }
    }
    assert!(upwards.is_empty(), "these import from a layer above their own: {upwards:#?}");
}

/// The modules of a room, by its directory.
fn modules(room: &str) -> String {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src").join(room);
    let names = fs::read_dir(source).into_iter().flatten().flatten().map(|entry| {
        let name = entry.file_name().to_string_lossy().into_owned();
        name.strip_suffix(".rs").map(ToOwned::to_owned).unwrap_or(name)
    });
    let mut names: Vec<_> =
        names.filter(|name| name != "mod" && name != "tests" && !name.contains('.')).collect();
    names.sort();
    names.dedup();
    names.join(", ")
}

/// The table of the layers, the highest first.
fn table() -> String {
    let mut table = "| layer | room | purpose | modules |\n|---|---|---|---|\n".to_owned();
    for (number, (rooms, purpose)) in LAYERS.iter().zip(PURPOSES).enumerate().rev() {
        let modules: Vec<_> =
            rooms.iter().map(|room| modules(room)).filter(|names| !names.is_empty()).collect();
        let rooms: Vec<_> = rooms.iter().map(|room| format!("`{room}`")).collect();
        table += &format!("| {} | {} | {purpose} | {} |\n", number + 1, rooms.join(", "), modules.join(", "));
    }
    table
}

#[test]
fn the_architecture_shows_the_layers() {
    const BEGIN: &str = "<!-- control-plane/tests/layers.rs writes this table -->\n";
    let document = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/ARCHITECTURE.md");
    let text = fs::read_to_string(&document).expect("the document");
    let (before, rest) = text.split_once(BEGIN).expect("the place of the table");
    let (_, after) = rest.split_once("\n\n").expect("text after the table");
    let wanted = format!("{before}{BEGIN}{}\n{after}", table());
    if std::env::var_os("KEYGATE_WRITE").is_some() {
        fs::write(&document, wanted).expect("the document");
    } else {
        assert!(text == wanted, "docs/ARCHITECTURE.md shows other layers; see the top of this file");
    }
}

/// The model and the key material are decided by their arguments alone: no runtime, no disk, no network, and the model has
/// no clock and no randomness either.
#[test]
fn the_model_is_pure() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let (mut impure, mut checked) = (Vec::new(), 0);
    for room in ["model", "secrets"] {
        let mut found = Vec::new();
        files(&source.join(room), &mut found);
        for file in found.iter().filter(|file| !file.ends_with("tests.rs")) {
            let text = fs::read_to_string(file).expect("a source file");
            let code = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
            let mut forbidden = vec!["tokio", "axum", "redb::", "redis::", "hyper", "std::net::Tcp"];
            if room == "model" {
                forbidden.extend(["Instant::now", "SystemTime", "getrandom", "platform::random", "std::fs"]);
            }
            checked += 1;
            let uses = code.lines().filter(|line| !line.trim_start().starts_with("//"));
            let uses = uses.filter(|line| forbidden.iter().any(|word| line.contains(word)));
            impure.extend(uses.map(|line| format!("{}: {}", file.display(), line.trim())));
        }
    }
    assert!(checked > 40 && impure.is_empty(), "of {checked} files, these are not pure: {impure:#?}");
}

/// Metrics are written and never read: only the exporter knows Prometheus, whose types can be read, and the kinds of
/// metrics that it offers have no way to read one.
#[test]
fn metrics_are_write_only() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    files(&source, &mut found);
    let (mut readers, mut checked) = (Vec::new(), 0);
    for file in &found {
        let text = fs::read_to_string(file).expect("a source file");
        let code = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
        if file.ends_with("tests.rs") {
            continue;
        }
        let is_exporter = file.starts_with(source.join("observe/metrics"));
        let forbidden: &[&str] = if file.ends_with("metrics/write_only.rs") {
            &[".get()", "get_sample", ".collect()", "Deref", "-> f64", "-> u64"]
        } else if is_exporter {
            &[]
        } else if file.ends_with("api/health.rs") {
            &["prometheus::"]
        } else {
            &["prometheus::", "metrics.text()"]
        };
        checked += usize::from(!forbidden.is_empty());
        let reads = forbidden.iter().filter(|word| code.contains(**word));
        readers.extend(reads.map(|word| format!("{}: {word}", file.display())));
    }
    assert!(
        checked > 100 && readers.is_empty(),
        "of {checked} files, these could read a metric: {readers:#?}"
    );
}

#[test]
fn an_import_of_a_layer_above_is_found() {
    assert_eq!(expand("a::{self, b, c::{d, e}}"), ["a::self", "a::b", "a::c::d", "a::c::e"]);
    assert_eq!(imports("use crate::api::json;\n#[cfg(test)]\nmod tests { use crate::app; }"), ["api::json"]);
    assert_eq!(imports("fn f() { crate::http::problem::of(1); }\n// crate::app"), ["http::problem::of"]);
    assert!(
        layer("http::api::json") > layer("services::quota") && layer("services") > layer("model::rollout")
    );
    assert_eq!(layer("nowhere"), None);
}
