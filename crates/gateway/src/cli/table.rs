//! Aligned columns of text, without colours and without boxes: the same for eyes and for `awk`.

use serde_json::Value;

/// Between two columns.
const GAP: &str = "  ";

/// A line for each row, its cells below each other, under a line of names.
pub(super) fn table(names: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    let names = names.iter().map(|&name| name.to_owned()).collect();
    align(std::iter::once(names).chain(rows).collect())
}

/// A line for each field of a record: its name, and what it is.
pub(super) fn fields(record: &Value) -> String {
    let entries = record.as_object().into_iter().flatten();
    align(entries.map(|(name, value)| vec![plain(name), cell(value)]).collect())
}

/// Rows of as many cells each.
pub(super) fn align(rows: Vec<Vec<String>>) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:<width$}"));
        cells.collect::<Vec<_>>().join(GAP).trim_end().to_owned()
    };
    rows.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// A value in one cell; nothing is `-`.
pub(super) fn cell(value: &Value) -> String {
    let joined = |cells: Vec<String>| if cells.is_empty() { "-".to_owned() } else { cells.join(", ") };
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) if text.is_empty() => "-".to_owned(),
        Value::String(text) => plain(text),
        Value::Array(items) => joined(items.iter().map(cell).collect()),
        Value::Object(entries) => {
            joined(entries.iter().map(|(name, value)| format!("{}={}", plain(name), cell(value))).collect())
        }
        Value::Bool(_) | Value::Number(_) => value.to_string(),
    }
}

/// Text of somebody else, safe to print: a terminal obeys none of it.
pub(super) fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn columns_stand_below_each_other() {
        let rows = [["a", "1"], ["größer", "2"]].map(|row| row.map(str::to_owned).to_vec());
        assert_eq!(table(&["NAME", "N"], rows.into_iter()), "NAME    N\na       1\ngrößer  2");
        assert_eq!(table(&["NAME", "N"], std::iter::empty()), "NAME  N");
    }

    #[test]
    fn a_cell_has_one_line_and_no_orders_for_a_terminal() {
        for (value, expected) in [
            (json!(null), "-"),
            (json!([]), "-"),
            (json!(["a", "b"]), "a, b"),
            (json!({ "user": ["a"], "authenticated": true }), "user=a, authenticated=true"),
            (json!("a\n\u{1b}[31mb"), "a\u{fffd}\u{fffd}[31mb"),
        ] {
            assert_eq!(cell(&value), expected, "{value}");
        }
    }
}
