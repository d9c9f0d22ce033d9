//! Months and the gate, from inside.
