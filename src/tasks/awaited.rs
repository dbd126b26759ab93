//! The names of the holds and tasks that a stop waits for, as a progress line gives them.

use std::fmt;

use super::list::Name;

/// What a stop waits for, apart from requests and connections: the first names, and how many more.
#[derive(Default)]
pub(crate) struct Awaited {
    names: Vec<String>,
    more: usize,
}

impl Awaited {
    /// How many names a progress line has.
    const MOST: usize = 3;

    pub(crate) fn is_nothing(&self) -> bool {
        self.names.is_empty()
    }

    pub(super) fn add<'a>(&mut self, kind: &str, names: impl Iterator<Item = &'a Name>) {
        for name in names {
            if self.names.len() < Self::MOST {
                self.names.push(format!("{kind} {name}"));
            } else {
                self.more += 1;
            }
        }
    }
}

impl fmt::Display for Awaited {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.names.join(", "))?;
        match self.more {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}
