//! The types of IO that are already tracked, so that [`serve`](crate::Graceful::serve) does not track a
//! connection twice.
//!
//! `serve` accepts any listener, and the IO of a listener may be any type. Each listener that tracks its
//! connections registers the type of its IO here. The list has one entry for each such type in the
//! program.

use std::{
    any::{Any, TypeId},
    sync::{Arc, Mutex},
};

use super::{ConnectionEntry, io::GracefulIo};
use crate::sync::lock;

/// Returns the connection that this IO belongs to.
pub(super) type Find = fn(&dyn Any) -> Option<Arc<ConnectionEntry>>;

static TYPES: Mutex<Vec<(TypeId, Find)>> = Mutex::new(Vec::new());

/// Registers that a listener returns tracked IO that wraps an `I`.
pub(super) fn note<I: 'static>() {
    fn find<I: 'static>(io: &dyn Any) -> Option<Arc<ConnectionEntry>> {
        let io: &GracefulIo<I> = io.downcast_ref()?;
        Some(Arc::clone(io.entry()))
    }

    let id = TypeId::of::<GracefulIo<I>>();
    let mut types = lock!(TYPES);
    if !types.iter().any(|(noted, _)| *noted == id) {
        types.push((id, find::<I>));
    }
}

/// The function that finds the connection of IO of this type, if a listener has registered the type.
#[cfg_attr(not(feature = "signal"), expect(dead_code))]
pub(super) fn finder<I: 'static>() -> Option<Find> {
    let id = TypeId::of::<I>();
    let types = lock!(TYPES);
    let noted = types.iter().find(|(noted, _)| *noted == id);
    noted.map(|(_, find)| *find)
}
