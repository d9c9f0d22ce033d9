//! YAML text as a tree. Anchors, aliases and `<<` are resolved here; what the values mean is decided elsewhere.

use std::collections::HashMap;

use granit_parser::{Event, Parser, ScalarStyle, Tag};

use super::problem::{Origin, Problems, quoted};
use super::tree::{Entry, Node, Scalar, Value};

/// The largest file that is read, bytes.
pub const FILE_BYTES_MAX: usize = 1 << 20;
/// Nodes of a tree, copies made by aliases included.
const NODES_MAX: usize = 200_000;
/// Bytes of text in a tree, copies made by aliases included.
const TEXT_BYTES_MAX: usize = 4 << 20;
/// Lists and maps inside each other. Everything that walks a tree recurses at most this deep.
const DEPTH_MAX: usize = 64;

/// Reads a file. `None` when it is not YAML at all; the reason is among the problems then. An empty file is an empty map.
pub(super) fn parse(text: &str, problems: &mut Problems) -> Option<Node> {
    if text.len() > FILE_BYTES_MAX {
        problems.error(
            Origin::START,
            "",
            format!("{} bytes are too many", text.len()),
            "at most 1 MiB is read",
        );
        return None;
    }
    let mut options =
        granit_parser::options! { flow_nesting_limit: DEPTH_MAX, block_nesting_limit: DEPTH_MAX };
    options.set_emit_comments(false);
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut parser = Parser::new_from_str_with_options(text, options);
    let mut builder = Builder::new(problems);
    while let Some(next) = parser.next_event() {
        let step = match next {
            Ok((event, span)) => builder.take(event, origin(span.start.line(), span.start.col())),
            Err(error) => {
                let (line, col) = (error.marker().line(), error.marker().col());
                let help = syntax_help(text, line, col);
                Err((origin(line, col), error.info(), help))
            }
        };
        if let Err((at, message, help)) = step {
            builder.problems.error(at, "", message, help);
            return None;
        }
    }
    Some(builder.root.unwrap_or(Node { at: Origin::START, value: Value::Map(Vec::new()) }))
}

/// The parser counts columns from 0.
fn origin(line: usize, col: usize) -> Origin {
    let bounded = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    Origin::File { line: bounded(line.max(1)), col: bounded(col.saturating_add(1)) }
}

/// Ends the reading: place, message, help.
type Stop = (Origin, String, String);

/// A list or map whose end has not come yet.
struct Open {
    at: Origin,
    anchor: usize,
    content: Content,
}

enum Content {
    List(Vec<Node>),
    Map(OpenMap),
}

#[derive(Default)]
struct OpenMap {
    entries: Vec<Entry>,
    seen: HashMap<String, Origin>,
    merges: Vec<Node>,
    key: Option<PendingKey>,
}

/// A key whose value has not come yet.
enum PendingKey {
    Named(String, Origin),
    Merge,
    /// Already reported; its value is dropped.
    Faulty,
}

/// What a finished node costs its copies.
#[derive(Clone, Copy, Default)]
struct Measure {
    nodes: usize,
    bytes: usize,
    depth: usize,
}

struct Builder<'p> {
    problems: &'p mut Problems,
    open: Vec<Open>,
    anchors: HashMap<usize, (Node, Measure)>,
    spent: Measure,
    root: Option<Node>,
}

impl<'p> Builder<'p> {
    fn new(problems: &'p mut Problems) -> Self {
        Self { problems, open: Vec::new(), anchors: HashMap::new(), spent: Measure::default(), root: None }
    }

    fn take(&mut self, event: Event<'_>, at: Origin) -> Result<(), Stop> {
        match event {
            Event::DocumentStart(..) if self.root.is_some() => Err((
                at,
                "a second document starts here".into(),
                "a configuration is one document: remove `---`".into(),
            )),
            Event::Scalar(text, style, anchor, tag) => {
                let is_text = self.check_tag(at, tag.as_deref());
                let plain = style == ScalarStyle::Plain && !is_text;
                let node = Node { at, value: scalar(text.into_owned(), plain) };
                self.finish(node, anchor)
            }
            Event::SequenceStart(_, anchor, tag) => {
                self.check_tag(at, tag.as_deref());
                self.enter(at, anchor, Content::List(Vec::new()))
            }
            Event::MappingStart(_, anchor, tag) => {
                self.check_tag(at, tag.as_deref());
                self.enter(at, anchor, Content::Map(OpenMap::default()))
            }
            Event::SequenceEnd | Event::MappingEnd => match self.open.pop() {
                Some(open) => self.close(open),
                None => Ok(()),
            },
            Event::Alias(anchor) => {
                let Some((node, measure)) = self.anchors.get(&anchor) else {
                    return Err((at, "this alias stands inside what it names".into(), String::new()));
                };
                let (node, measure) = (node.clone(), *measure);
                self.spend(at, measure)?;
                self.place(node);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn enter(&mut self, at: Origin, anchor: usize, content: Content) -> Result<(), Stop> {
        self.open.push(Open { at, anchor, content });
        self.spend(at, Measure { nodes: 1, bytes: 0, depth: 0 })
    }

    fn close(&mut self, open: Open) -> Result<(), Stop> {
        let value = match open.content {
            Content::List(items) => Value::List(items),
            Content::Map(map) => Value::Map(self.merge(map)),
        };
        let node = Node { at: open.at, value };
        self.remember(&node, open.anchor)?;
        self.place(node);
        Ok(())
    }

    fn finish(&mut self, node: Node, anchor: usize) -> Result<(), Stop> {
        self.spend(node.at, measure(&node))?;
        self.remember(&node, anchor)?;
        self.place(node);
        Ok(())
    }

    /// The copy kept for aliases is paid for like the others.
    fn remember(&mut self, node: &Node, anchor: usize) -> Result<(), Stop> {
        if anchor > 0 {
            let measure = measure(node);
            self.spend(node.at, measure)?;
            self.anchors.insert(anchor, (node.clone(), measure));
        }
        Ok(())
    }

    fn spend(&mut self, at: Origin, cost: Measure) -> Result<(), Stop> {
        self.spent.nodes += cost.nodes;
        self.spent.bytes += cost.bytes;
        let stop = |what: String| Err((at, what, "aliases count as often as they are used".into()));
        if self.open.len() + cost.depth > DEPTH_MAX {
            return stop(format!("nested deeper than {DEPTH_MAX}"));
        }
        if self.spent.nodes > NODES_MAX {
            return stop(format!("more than {NODES_MAX} values"));
        }
        if self.spent.bytes > TEXT_BYTES_MAX {
            return stop("more than 4 MiB of text".to_owned());
        }
        Ok(())
    }

    /// Puts a finished node where it belongs: root, item, key or value.
    fn place(&mut self, node: Node) {
        let Some(parent) = self.open.last_mut() else {
            self.root = Some(node);
            return;
        };
        let map = match &mut parent.content {
            Content::List(items) => return items.push(node),
            Content::Map(map) => map,
        };
        match map.key.take() {
            None => map.key = Some(key(node, &mut map.seen, self.problems)),
            Some(PendingKey::Named(key, at)) => map.entries.push(Entry { key, at, value: node }),
            Some(PendingKey::Merge) => map.merges.push(node),
            Some(PendingKey::Faulty) => {}
        }
    }

    /// `<<`: keys of the maps named there, as far as the map does not have them itself.
    fn merge(&mut self, map: OpenMap) -> Vec<Entry> {
        let OpenMap { mut entries, mut seen, merges, .. } = map;
        for source in merges {
            let at = source.at;
            let maps = match source.value {
                Value::List(items) => items,
                value => vec![Node { at, value }],
            };
            for Node { at, value } in maps {
                let Value::Map(merged) = value else {
                    self.problems.error(
                        at,
                        "",
                        "`<<` needs a map, or a list of maps",
                        "for example `<<: *defaults`",
                    );
                    continue;
                };
                for entry in merged {
                    if seen.insert(entry.key.clone(), entry.at).is_none() {
                        entries.push(entry);
                    }
                }
            }
        }
        entries
    }

    /// Whether the tag says that the scalar is text. Tags of an application have no meaning here.
    fn check_tag(&mut self, at: Origin, tag: Option<&Tag>) -> bool {
        let Some(tag) = tag else { return false };
        if !tag.is_yaml_core_schema() {
            self.problems.error(
                at,
                "",
                format!("the tag {} has no meaning here", quoted(&tag.original())),
                "remove it",
            );
        }
        tag.is_yaml_core_schema_tag("str")
    }
}

/// In `[…]` and `{…}` the brace of an unquoted `${` opens a map, which nobody meant.
fn syntax_help(text: &str, line: usize, col: usize) -> String {
    let line = text.lines().nth(line.saturating_sub(1)).unwrap_or_default();
    if line.chars().skip(col.saturating_sub(1)).take(2).eq("${".chars()) {
        return "inside […] and {…} YAML wants quotes around `$`: \"${NAME}\"".to_owned();
    }
    String::new()
}

fn scalar(text: String, plain: bool) -> Value {
    if plain && matches!(text.as_str(), "" | "~" | "null" | "Null" | "NULL") {
        return Value::Null;
    }
    Value::Scalar(Scalar { text, plain, expanded: false })
}

fn key(node: Node, seen: &mut HashMap<String, Origin>, problems: &mut Problems) -> PendingKey {
    let Value::Scalar(Scalar { text, plain, .. }) = node.value else {
        problems.error(node.at, "", "a key must be text", "");
        return PendingKey::Faulty;
    };
    if let Some(Origin::File { line, .. }) = seen.get(&text) {
        problems.error(
            node.at,
            "",
            format!("duplicate key {}", quoted(&text)),
            format!("it is on line {line} already"),
        );
        return PendingKey::Faulty;
    }
    seen.insert(text.clone(), node.at);
    if plain && text == "<<" {
        return PendingKey::Merge;
    }
    PendingKey::Named(text, node.at)
}

fn measure(node: &Node) -> Measure {
    let mut sum = Measure { nodes: 1, bytes: 0, depth: 0 };
    let mut add = |child: Measure| {
        sum.nodes += child.nodes;
        sum.bytes += child.bytes;
        sum.depth = sum.depth.max(child.depth + 1);
    };
    match &node.value {
        Value::Null | Value::Faulty => {}
        Value::Scalar(scalar) => sum.bytes = scalar.text.len(),
        Value::List(items) => items.iter().for_each(|item| add(measure(item))),
        Value::Map(entries) => entries.iter().for_each(|entry| {
            add(measure(&entry.value));
            add(Measure { nodes: 0, bytes: entry.key.len(), depth: 0 });
        }),
    }
    sum
}
