//! The house rules as a test: sizes, headers, where `unsafe` may stand, who may depend on whom.
//!
//! Exceptions are lists that may only shrink: an entry that is no longer needed fails the test too.

#![expect(clippy::unwrap_used, reason = "a test that cannot read the sources has failed")]

use proc_macro2::{TokenStream, TokenTree};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use syn::spanned::Spanned;
use syn::visit::{self, Visit};

const MAX_FILE_LINES: usize = 500;
const MAX_FUNCTION_LINES: usize = 70;

/// Files above the limit, with the size they must not exceed. Shrinks only.
const LONG_FILES: &[(&str, usize)] = &[];
/// Functions above the limit, as `file:function`, with the size they must not exceed. Shrinks only.
const LONG_FUNCTIONS: &[(&str, usize)] = &[];
/// The only files in which `unsafe` may stand.
const UNSAFE_FILES: &[&str] = &[
    "arch/src/x86_64/state/sys.rs",
    "benches/kit/src/warm.rs",
    "devices/src/virtio/balloon/discard.rs",
    "devices/src/virtio/blk/ring.rs",
    "devices/src/virtio/blk/sys.rs",
    "devices/src/virtio/net/port.rs",
    "devices/src/virtio/net/tap.rs",
    "migration/benches/file.rs",
    "migration/src/file/sys.rs",
    "migration/src/file/uffd.rs",
    "migration/src/present.rs",
    "migration/src/ram.rs",
    "src/allocator.rs",
    "src/commands/fork.rs",
    "src/console/last_words.rs",
    "src/host_check/sys.rs",
    "src/vmm/dirty.rs",
    "src/vmm/kick.rs",
    "src/vmm/memory.rs",
    "src/vmm/vcpu.rs",
    "tests/guest/image/boot.rs",
    "tests/guest/image/mem.rs",
    "tests/guest/image/memory.rs",
    "tests/guest/image/port.rs",
    "tests/sandbox/sys.rs",
    "tests/testbed/src/tsc.rs",
];
/// The only edges between our crates. Siblings do not know each other.
const EDGES: &[(&str, &[&str])] = &[
    (
        "Cargo.toml",
        &["sterna-arch", "sterna-bench", "sterna-devices", "sterna-guest", "sterna-migration", "sterna-testbed"],
    ),
    ("arch/Cargo.toml", &[]),
    ("benches/kit/Cargo.toml", &["sterna-migration"]),
    ("devices/Cargo.toml", &[]),
    ("fuzz/Cargo.toml", &["sterna", "sterna-arch", "sterna-devices", "sterna-migration"]),
    ("migration/Cargo.toml", &[]),
    ("tests/guest/Cargo.toml", &[]),
    ("tests/testbed/Cargo.toml", &[]),
];
/// Words that must not stand in a source file, with the reason.
const BANNED: &[(&str, &str)] = &[
    ("todo!(", "do it or open an issue"),
    ("unimplemented!(", "do it or do not offer it"),
    ("#[ignore", "a test that does not run is not a test"),
    ("transmute", "wire and guest structures are read by field"),
];

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Every Rust file of ours with its path from the root and its text.
fn sources() -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let folders = ["src", "arch", "devices", "migration", "tests", "benches", "fuzz"];
    let mut pending: Vec<PathBuf> = folders.iter().map(|folder| root().join(folder)).filter(|p| p.exists()).collect();
    while let Some(folder) = pending.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                if path.file_name().is_some_and(|name| name != "target" && name != "corpus" && name != "artifacts") {
                    pending.push(path);
                }
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned();
                found.insert(name, fs::read_to_string(&path).unwrap());
            }
        }
    }
    assert!(found.len() > 30, "only {} source files found: the walk is broken", found.len());
    found
}

/// Compares what is over a limit with the list of known exceptions, both ways.
fn check_ratchet(kind: &str, over: &BTreeMap<String, usize>, known: &[(&str, usize)], problems: &mut Vec<String>) {
    for (name, lines) in over {
        match known.iter().find(|(known, _)| known == name) {
            None => problems.push(format!("{name}: {lines} lines, too long for a {kind}")),
            Some((_, limit)) if lines > limit => problems.push(format!("{name}: grew from {limit} to {lines} lines")),
            Some((_, limit)) if lines < limit => {
                problems.push(format!("{name}: shrank from {limit} to {lines} lines, so shrink its entry in the list"));
            }
            Some(_) => {}
        }
    }
    for (name, _) in known.iter().filter(|(name, _)| !over.contains_key(*name)) {
        problems.push(format!("{name}: within the limit now, so take it off the list"));
    }
}

fn assert_none(problems: &[String]) {
    assert!(problems.is_empty(), "\n{}\n", problems.join("\n"));
}

#[test]
fn files_are_short_and_say_what_they_are() {
    let (mut problems, mut over) = (Vec::new(), BTreeMap::new());
    for (name, text) in sources() {
        if !text.starts_with("//!") {
            problems.push(format!("{name}: does not open with //! and what it is"));
        }
        let lines = text.lines().count();
        if lines > MAX_FILE_LINES {
            over.insert(name, lines);
        }
    }
    check_ratchet("file", &over, LONG_FILES, &mut problems);
    assert_none(&problems);
}

struct Functions<'a> {
    file: &'a str,
    over: &'a mut BTreeMap<String, usize>,
}

impl Functions<'_> {
    fn measure(&mut self, name: &syn::Ident, block: &syn::Block) {
        let span = block.span();
        let lines = span.end().line - span.start().line + 1;
        if lines > MAX_FUNCTION_LINES {
            self.over.insert(format!("{}:{name}", self.file), lines);
        }
    }
}

impl<'ast> Visit<'ast> for Functions<'_> {
    fn visit_item_fn(&mut self, item: &'ast syn::ItemFn) {
        self.measure(&item.sig.ident, &item.block);
        visit::visit_item_fn(self, item);
    }
    fn visit_impl_item_fn(&mut self, item: &'ast syn::ImplItemFn) {
        self.measure(&item.sig.ident, &item.block);
        visit::visit_impl_item_fn(self, item);
    }
    fn visit_trait_item_fn(&mut self, item: &'ast syn::TraitItemFn) {
        if let Some(body) = &item.default {
            self.measure(&item.sig.ident, body);
        }
        visit::visit_trait_item_fn(self, item);
    }
}

#[test]
fn functions_are_short() {
    let (mut problems, mut over) = (Vec::new(), BTreeMap::new());
    for (name, text) in sources() {
        match syn::parse_file(&text) {
            Ok(file) => Functions { file: &name, over: &mut over }.visit_file(&file),
            Err(error) => problems.push(format!("{name}: does not parse: {error}")),
        }
    }
    check_ratchet("function", &over, LONG_FUNCTIONS, &mut problems);
    assert_none(&problems);
}

/// Whether the word `unsafe` stands among `tokens`: a block, a function, an `extern`, an attribute, in a macro or out of it.
fn has_unsafe(tokens: TokenStream) -> bool {
    tokens.into_iter().any(|token| match token {
        TokenTree::Ident(word) => word == "unsafe",
        TokenTree::Group(group) => has_unsafe(group.stream()),
        TokenTree::Punct(_) | TokenTree::Literal(_) => false,
    })
}

#[test]
fn unsafe_stands_only_where_it_may() {
    let mut used = BTreeSet::new();
    for (name, text) in sources() {
        if has_unsafe(text.parse().unwrap()) {
            used.insert(name);
        }
    }
    let allowed: BTreeSet<String> = UNSAFE_FILES.iter().map(|name| (*name).to_owned()).collect();
    let mut problems: Vec<String> =
        used.difference(&allowed).map(|name| format!("{name}: unsafe, not listed")).collect();
    problems.extend(allowed.difference(&used).map(|name| format!("{name}: listed, but has no unsafe any more")));
    assert_none(&problems);
}

#[test]
fn unsafe_is_seen_wherever_it_stands_and_a_word_in_a_text_is_none() {
    for text in [
        "fn f() { unsafe { g() } }",
        "unsafe fn f() {}",
        "unsafe extern \"C\" { fn f(); }",
        "#[unsafe(no_mangle)] fn f() {}",
        "unsafe trait T {}",
        "macro_rules! m { () => { unsafe { g() } } }",
    ] {
        assert!(has_unsafe(text.parse().unwrap()), "{text}");
    }
    assert!(!has_unsafe("/// unsafe\nfn f() { g(\"unsafe\"); unsafe_name() }".parse().unwrap()));
}

#[test]
fn every_kind_of_function_is_measured() {
    let body = "\n".repeat(MAX_FUNCTION_LINES);
    let text = format!(
        "fn free() {{{body}}} impl T for S {{ fn method() {{{body}}} }} trait T {{ fn default() {{{body}}} fn none(); }}"
    );
    let mut over = BTreeMap::new();
    Functions { file: "f", over: &mut over }.visit_file(&syn::parse_file(&text).unwrap());
    assert_eq!(over.keys().collect::<Vec<_>>(), ["f:default", "f:free", "f:method"]);
}

#[test]
fn crates_depend_only_downwards() {
    let mut problems = Vec::new();
    let mut crates: Vec<_> = workspace_crates().iter().map(|path| format!("{path}/Cargo.toml")).collect();
    crates.extend(["Cargo.toml".to_owned(), "fuzz/Cargo.toml".to_owned()]);
    for manifest in crates {
        let Some((_, allowed)) = EDGES.iter().find(|(listed, _)| **listed == manifest) else {
            problems.push(format!("{manifest}: what may it depend on?"));
            continue;
        };
        let table: toml::Table = fs::read_to_string(root().join(&manifest)).unwrap().parse().unwrap();
        for name in own_dependencies(&table).iter().filter(|name| !allowed.contains(&name.as_str())) {
            problems.push(format!("{manifest}: must not depend on {name}"));
        }
    }
    assert_none(&problems);
}

/// The directories of the workspace's other crates.
fn workspace_crates() -> Vec<String> {
    let manifest: toml::Table = fs::read_to_string(root().join("Cargo.toml")).unwrap().parse().unwrap();
    let members = manifest["workspace"]["members"].as_array().unwrap().iter();
    members.map(|path| path.as_str().unwrap().to_owned()).filter(|path| path != ".").collect()
}

/// This tree's crates that a manifest names as dependencies, those of single targets among them.
fn own_dependencies(manifest: &toml::Table) -> Vec<String> {
    let targets = manifest.get("target").and_then(toml::Value::as_table);
    let tables = targets.into_iter().flat_map(toml::Table::values).filter_map(toml::Value::as_table);
    let sections = ["dependencies", "dev-dependencies", "build-dependencies"];
    let dependencies = std::iter::once(manifest)
        .chain(tables)
        .flat_map(|table| sections.into_iter().filter_map(|section| table.get(section)?.as_table()));
    dependencies.flat_map(toml::Table::keys).filter(|name| name.starts_with("sterna")).cloned().collect()
}

#[test]
fn every_dependency_says_why() {
    let text = fs::read_to_string(root().join("Cargo.toml")).unwrap();
    let section = text.split("[workspace.dependencies]").nth(1).unwrap().split("\n[").next().unwrap();
    let bare =
        section.lines().filter(|line| line.contains('=') && !line.starts_with("sterna-") && !line.contains("# "));
    assert_none(&bare.map(|line| format!("no reason given: {line}")).collect::<Vec<_>>());
}

#[test]
fn nothing_banned_is_written() {
    let mut problems = Vec::new();
    for (name, text) in sources().iter().filter(|(name, _)| *name != "tests/rules.rs") {
        for (word, reason) in BANNED {
            if let Some(line) = text.lines().position(|line| line.contains(word)) {
                problems.push(format!("{name}:{}: {word} ({reason})", line + 1));
            }
        }
    }
    assert_none(&problems);
}

/// The folder of a source file as the map names it: in full for the product, by its first two names for tests and tools.
fn folder_on_the_map(file: &str) -> Option<String> {
    let folder = Path::new(file).parent()?;
    let product = ["src", "arch", "devices", "migration"].iter().any(|top| folder.starts_with(top));
    let names =
        folder.iter().take_while(|name| *name != "tests" || !product).take(if product { usize::MAX } else { 2 });
    Some(format!("{}/", names.collect::<PathBuf>().to_str()?))
}

/// ARCHITECTURE.md is the map: it stays short, and it names every folder of the code.
#[test]
fn the_map_is_short_and_complete() {
    let text = fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    assert!(text.lines().count() <= 200, "ARCHITECTURE.md has more than 200 lines");
    let folders: BTreeSet<String> = sources().keys().filter_map(|name| folder_on_the_map(name)).collect();
    let missing = folders.iter().filter(|folder| !text.contains(folder.as_str()));
    assert_none(&missing.map(|folder| format!("ARCHITECTURE.md does not name {folder}")).collect::<Vec<_>>());
}
