use crate::handle::Pass;

/// What a response future, and after it the response's body, holds for its request.
pub(super) enum Held<S> {
    Nothing,
    /// The request is in flight, and that is all.
    Pass(Pass),
    /// There is more to it. Boxed, because it is rare.
    Special(Box<S>),
}

impl<S> Held<S> {
    pub(super) fn special(special: S) -> Self {
        Self::Special(Box::new(special))
    }

    #[inline]
    pub(super) fn take(&mut self) -> Self {
        std::mem::replace(self, Self::Nothing)
    }
}
