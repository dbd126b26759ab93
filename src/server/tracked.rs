//! Which IO is tracked already, so that [`serve`](crate::Graceful::serve) does not track it again.
//!
//! `serve` takes every listener, and a listener's IO may be any type. Listeners whose connections are
//! tracked note the type of their IO here. There are as many entries as there are such types in the
//! program.

use std::{
    any::{Any, TypeId},
    sync::{Arc, Mutex},
};

use super::{ConnectionEntry, io::GracefulIo};
use crate::sync::lock;

/// Finds the connection that the IO belongs to.
pub(super) type Find = fn(&dyn Any) -> Option<Arc<ConnectionEntry>>;

static TYPES: Mutex<Vec<(TypeId, Find)>> = Mutex::new(Vec::new());

/// Notes that some listener returns tracked IO of this type.
pub(super) fn note<I: 'static>() {
    fn find<I: 'static>(io: &dyn Any) -> Option<Arc<ConnectionEntry>> {
        let io: &GracefulIo<I> = io.downcast_ref()?;
        Some(Arc::clone(io.line()))
    }

    let id = TypeId::of::<GracefulIo<I>>();
    let mut types = lock!(TYPES);
    if !types.iter().any(|(noted, _)| *noted == id) {
        types.push((id, find::<I>));
    }
}

/// How to find the connection that IO of this type belongs to, if some listener has noted it.
#[cfg_attr(not(feature = "signal"), expect(dead_code))]
pub(super) fn find<I: 'static>() -> Option<Find> {
    let id = TypeId::of::<I>();
    let types = lock!(TYPES);
    let noted = types.iter().find(|(noted, _)| *noted == id);
    noted.map(|(_, find)| *find)
}
