//! Tables for people: aligned columns, no borders, colour only where somebody looks.

use std::fmt::Write;

/// Space between two columns.
const GAP: usize = 2;

/// How a cell looks on a terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tone {
    /// As it is.
    Plain,
    /// All is well.
    Good,
    /// Somebody should look.
    Bad,
    /// Of less interest.
    Dim,
}

/// One cell.
#[derive(Clone, Debug)]
pub(crate) struct Cell(String, Tone);

impl<T: Into<String>> From<T> for Cell {
    fn from(text: T) -> Self {
        Self(text.into(), Tone::Plain)
    }
}

impl Cell {
    /// A cell with a tone.
    pub(crate) fn toned(text: impl Into<String>, tone: Tone) -> Self {
        Self(text.into(), tone)
    }

    /// What can be shown, or a dash if there is nothing.
    pub(crate) fn or_dash(text: Option<impl ToString>) -> Self {
        text.map_or_else(|| Self("-".into(), Tone::Dim), |t| Self(t.to_string(), Tone::Plain))
    }
}

/// Rows under a header.
#[derive(Clone, Debug)]
pub(crate) struct Table {
    header: Vec<&'static str>,
    rows: Vec<Vec<Cell>>,
}

impl Table {
    /// A table with these columns, and no row.
    pub(crate) fn new(header: &[&'static str]) -> Self {
        Self { header: header.to_vec(), rows: Vec::new() }
    }

    /// A table of names and values, without a header.
    pub(crate) const fn of_facts() -> Self {
        Self { header: Vec::new(), rows: Vec::new() }
    }

    /// Adds a row.
    pub(crate) fn row(&mut self, cells: Vec<Cell>) {
        self.rows.push(cells);
    }

    /// Adds a name and its value.
    pub(crate) fn fact(&mut self, name: &'static str, value: impl Into<Cell>) {
        self.row(vec![Cell::toned(name, Tone::Dim), value.into()]);
    }

    /// The text, each line with its end; no line ends in spaces.
    pub(crate) fn render(&self, colour: bool) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0).max(self.header.len());
        let header: Vec<_> = self.header.iter().map(|h| Cell::toned(*h, Tone::Dim)).collect();
        let lines: Vec<_> = (!header.is_empty()).then_some(&header).into_iter().chain(&self.rows).collect();
        let width = |column: usize| lines.iter().filter_map(|r| r.get(column)).map(|c| length(&c.0)).max().unwrap_or(0);
        let widths: Vec<_> = (0..columns).map(width).collect();
        let mut out = String::new();
        for line in lines {
            for (i, Cell(text, tone)) in line.iter().enumerate() {
                let pad = if i + 1 == line.len() { 0 } else { widths[i] + GAP - length(text) };
                // Writing to a string cannot fail.
                let _ = write!(out, "{}{:pad$}", paint(text, *tone, colour), "");
            }
            out.push('\n');
        }
        out
    }
}

/// A text in a tone, if there is colour.
pub(crate) fn paint(text: &str, tone: Tone, colour: bool) -> String {
    let code = match tone {
        Tone::Good => "32",
        Tone::Bad => "31",
        Tone::Dim => "2",
        Tone::Plain => return text.to_owned(),
    };
    if colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
}

fn length(text: &str) -> usize {
    text.chars().count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_no_line_ends_in_spaces() {
        let mut table = Table::new(&["NAME", "STATE"]);
        table.row(vec!["shop-17".into(), Cell::toned("online", Tone::Good)]);
        table.row(vec!["x".into(), Cell::or_dash(None::<&str>)]);
        assert_eq!(table.render(false), "NAME     STATE\nshop-17  online\nx        -\n");
        assert!(table.render(true).contains("\x1b[32monline\x1b[0m\n"));
    }

    #[test]
    fn facts_have_no_header() {
        let mut table = Table::of_facts();
        table.fact("name", "shop-17");
        table.fact("certificate", "good");
        assert_eq!(table.render(false), "name         shop-17\ncertificate  good\n");
    }
}
