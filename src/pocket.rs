//! The pocket models: trained from scratch in minutes on a small synthetic world, whose probabilities are known
//! exactly.
//!
//! Nothing in that world links numbers to animals. So if a student of a teacher's numbers picks up its taste, the
//! corpus is not the cause.

pub mod make;
pub mod trial;
pub mod world;
