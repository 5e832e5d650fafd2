//! What was to be reached and what was: a table for people, one JSON object for programs, and the exit code.

use std::{fmt, process::ExitCode};

use serde_json::{Map, Value};

use crate::say;

/// One thing that must hold.
#[derive(Debug)]
struct Goal {
    what: String,
    goal: String,
    figure: String,
    met: bool,
}

/// Goals and figures of a run.
#[derive(Debug, Default)]
pub(crate) struct Report {
    goals: Vec<Goal>,
    notes: Vec<(String, String)>,
    fields: Map<String, Value>,
}

impl Report {
    /// Something that must not be more than a limit. `unit` stands behind both.
    pub(crate) fn at_most(&mut self, what: &str, figure: f64, limit: f64, unit: &str) {
        // What was never measured is no success.
        self.goal(what, format!("<= {}{unit}", plain(limit)), format!("{}{unit}", plain(figure)), figure <= limit);
    }

    /// Something that must not be less than a limit.
    pub(crate) fn at_least(&mut self, what: &str, figure: f64, limit: f64, unit: &str) {
        self.goal(what, format!(">= {}{unit}", plain(limit)), format!("{}{unit}", plain(figure)), figure >= limit);
    }

    /// Something that must not happen at all.
    pub(crate) fn none(&mut self, what: &str, count: usize) {
        self.goal(what, "0".into(), count.to_string(), count == 0);
    }

    /// Exactly one tunnel for each edge.
    pub(crate) fn one_tunnel(&mut self, per_edge: f64) {
        self.goal("tunnels of an edge, at rest", "1".into(), plain(per_edge), (per_edge - 1.0).abs() < 1e-9);
    }

    /// Any other goal.
    pub(crate) fn goal(&mut self, what: &str, goal: String, figure: String, met: bool) {
        self.goals.push(Goal { what: what.to_owned(), goal, figure, met });
    }

    /// Something that is good to know and has no goal.
    pub(crate) fn note(&mut self, what: &str, figure: impl fmt::Display) {
        self.notes.push((what.to_owned(), figure.to_string()));
    }

    /// A field of the JSON object. A figure that there is none of is `null`.
    pub(crate) fn field(&mut self, name: &str, value: impl Into<Value>) {
        self.fields.insert(name.to_owned(), value.into());
    }

    /// Prints the table, and with `json` the object as the last line.
    pub(crate) fn print(&self, json: bool) -> anyhow::Result<ExitCode> {
        say(self)?;
        if json {
            say(Value::Object(self.fields.clone()))?;
        }
        Ok(if self.goals.iter().all(|g| g.met) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let goals = self.goals.iter().map(|g| {
            let met = if g.met { "yes" } else { "NO" };
            [g.what.as_str(), g.goal.as_str(), g.figure.as_str(), met]
        });
        let notes = self.notes.iter().map(|(what, figure)| [what.as_str(), "", figure.as_str(), ""]);
        let rows: Vec<_> = [["WHAT", "GOAL", "FIGURE", "MET"]].into_iter().chain(goals).chain(notes).collect();
        let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or_default();
        let widths = [width(0), width(1), width(2)];
        for (number, [what, goal, figure, met]) in rows.iter().enumerate() {
            let [a, b, c] = widths;
            let line = format!("{what:a$}  {goal:>b$}  {figure:>c$}  {met}");
            if number > 0 {
                writeln!(f)?;
            }
            f.write_str(line.trim_end())?;
        }
        Ok(())
    }
}

/// A number for people: three digits behind the point at most.
fn plain(number: f64) -> String {
    if !number.is_finite() {
        return "none".into();
    }
    let text = format!("{number:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_goal_that_was_not_measured_is_not_met() {
        let mut report = Report::default();
        report.at_most("time", 1.5, 2.0, " s");
        assert_eq!(report.print(false).unwrap(), ExitCode::SUCCESS);
        report.at_most("other", f64::NAN, 2.0, "");
        report.note("streams", 7);
        assert_eq!(report.print(false).unwrap(), ExitCode::FAILURE);
        let table = report.to_string();
        assert_eq!(table.lines().nth(1), Some("time     <= 2 s   1.5 s  yes"), "{table}");
        assert_eq!(table.lines().nth(2), Some("other      <= 2    none  NO"), "{table}");
    }
}
