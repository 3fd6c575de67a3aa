"""How the bundled model was made: pictures, training, and a stand-in of the published size for measurements."""
